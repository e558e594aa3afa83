// Package announce tells others whether a listener should get connections, by a file that exists while it
// should, and by commands: for BGP daemons, which then announce its addresses or withdraw them.
package announce

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/tailsplice/tailsplice/userspace/hook"
)

// Spec is how others are told.
type Spec struct {
	Listener string `json:"listener"`
	// exists while the listener should get connections; "": there is none
	File    string        `json:"file,omitempty"`
	Up      []string      `json:"up,omitempty"`   // program with arguments; nil: there is none
	Down    []string      `json:"down,omitempty"` // the same
	Timeout time.Duration `json:"timeout"`        // of one run
}

func (s Spec) equal(o Spec) bool {
	return s.Listener == o.Listener && s.File == o.File && s.hasProgramsOf(o) && s.Timeout == o.Timeout
}

func (s Spec) hasProgramsOf(o Spec) bool {
	return slices.Equal(s.Up, o.Up) && slices.Equal(s.Down, o.Down)
}

// Continues reports whether s is announced in the place of o: for the same listener, by the same file, or by
// the same programs.
func (s Spec) Continues(o Spec) bool {
	return s.Listener == o.Listener || s.File != "" && s.File == o.File || len(s.Up) > 0 && s.hasProgramsOf(o)
}

// What failed is tried again after firstRetry, and then after twice as long each time, up to lastRetry.
const (
	firstRetry = time.Second
	lastRetry  = 30 * time.Second
)

// An Announcer tells others of one listener. Make it with New, and end it with End or Leave.
type Announcer struct {
	log    *slog.Logger
	ctx    context.Context
	cancel context.CancelFunc
	wake   chan struct{}
	gone   chan struct{} // closed when nothing is told any more

	mu sync.Mutex
	// +checklocks:mu
	want order
	// +checklocks:mu
	told order // last, or by another process
	// +checklocks:mu
	held bool
	// +checklocks:mu
	interrupt context.CancelFunc // ends the command that runs
	// +checklocks:mu
	tried int // the number of the last order that was carried out, or failed
	// +checklocks:mu
	moved chan struct{} // closed when tried moves
	// +checklocks:mu
	err error // why the last order is not carried out
	// +checklocks:mu
	tries int // orders that were carried out, or failed
	// +checklocks:mu
	after <-chan struct{} // nothing is told before it is closed; nil: it was
}

// order is what is to be told.
type order struct {
	Spec
	number int // 0: nothing yet
	isUp   bool
	reason string // why it is not up
}

// New tells nothing until Set.
func New(log *slog.Logger) *Announcer {
	a := &Announcer{log: log, wake: make(chan struct{}, 1), gone: make(chan struct{}), moved: make(chan struct{})}
	a.ctx, a.cancel = context.WithCancel(context.Background())
	go a.run()
	return a
}

// Inherit notes that others were told by what, in another process, that its listener should get connections.
// It comes before Set.
func (a *Announcer) Inherit(what Spec) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.told = order{Spec: what, isUp: true}
}

// After has nothing told before ended is closed, as what others are told until then may be of the same. It
// comes before Set.
func (a *Announcer) After(ended <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.after = ended
}

// Set has others told, soon, that the listener should get connections, or else why not. It returns at once.
// Of several calls while a command runs the last one counts; another reason alone is told to nobody.
func (a *Announcer) Set(spec Spec, isUp bool, reason string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if w := &a.want; w.number > 0 && w.isUp == isUp && w.equal(spec) {
		w.reason = reason
		return
	}
	a.want = order{spec, a.want.number + 1, isUp, reason}
	a.look()
}

// Hold has nothing told from now on, and kills a command that runs; without hold what was last set is told
// again.
func (a *Announcer) Hold(hold bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.held = hold
	if hold && a.interrupt != nil {
		a.interrupt()
	}
	if !hold && a.want.number > 0 {
		a.want.number++
	}
	a.look()
}

// look has run look for what is to be done.
func (a *Announcer) look() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// State is what was last set. err says why others may not know yet.
func (a *Announcer) State() (isUp bool, reason string, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.want.isUp, a.want.reason, a.err
}

// Spec is that of what was last set.
func (a *Announcer) Spec() Spec {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.want.Spec
}

// Status is State for people: up or down, and why it is down.
func (a *Announcer) Status() (told, why string) {
	isUp, reason, _ := a.State()
	return state(isUp), reason
}

// Wait waits until what was last set has been told, or could not be, or ctx ends.
func (a *Announcer) Wait(ctx context.Context) {
	for {
		a.mu.Lock()
		isDone, moved := a.tried >= a.want.number, a.moved
		a.mu.Unlock()
		if isDone {
			return
		}
		select {
		case <-moved:
		case <-a.gone:
			return
		case <-ctx.Done():
			return
		}
	}
}

// End has others told that the listener should get no connections, waits until that is done or has failed
// once, and tells nothing afterwards. It may be called several times.
func (a *Announcer) End(reason string) {
	a.mu.Lock()
	isSet, spec := a.want.number > 0, a.want.Spec
	a.mu.Unlock()
	if isSet {
		a.Set(spec, false, reason)
		a.Wait(a.ctx)
	}
	a.Leave()
	<-a.gone
}

// Leave tells nothing afterwards, and leaves what was told: it is another process's.
func (a *Announcer) Leave() { a.cancel() }

func (a *Announcer) run() {
	defer close(a.gone)
	retry := time.NewTimer(0)
	defer retry.Stop()
	pause := firstRetry
	for {
		select {
		case <-a.ctx.Done():
			return
		case <-a.wake:
		case <-retry.C:
		}
		for { // until what is set is told
			a.mu.Lock()
			want, told, isDone := a.want, a.told, a.held || a.ctx.Err() != nil || a.tried >= a.want.number && a.err == nil
			ctx, interrupt := context.WithCancel(a.ctx)
			a.interrupt = interrupt
			after := a.after
			a.mu.Unlock()
			if isDone {
				interrupt()
				break
			}
			if after != nil {
				select {
				case <-after:
					a.After(nil)
				case <-ctx.Done():
				}
				interrupt()
				continue
			}
			err := a.tell(ctx, want, told)
			interrupt()
			a.mu.Lock()
			a.told = want
			if a.held || a.ctx.Err() != nil { // it was interrupted
				a.mu.Unlock()
				break
			}
			before, isLast := a.err, a.want.number == want.number
			a.tried, a.err = want.number, err
			a.tries++
			close(a.moved)
			a.moved = make(chan struct{})
			a.mu.Unlock()
			if err != nil && (before == nil || before.Error() != err.Error()) {
				a.log.Warn("others can't be told whether a listener should get connections: it is tried again",
					"listener", want.Listener, "state", state(want.isUp), "err", err)
			}
			if err == nil {
				a.log.Info("others were told whether a listener should get connections",
					"listener", want.Listener, "state", state(want.isUp), "reason", want.reason)
				pause = firstRetry
			} else if isLast {
				retry.Reset(pause)
				pause = min(2*pause, lastRetry)
				break
			}
		}
	}
}

// tell carries out w. What told has announced otherwise, since something else was configured, is withdrawn
// first.
func (a *Announcer) tell(ctx context.Context, w, told order) error {
	var errs []error
	if told.File != "" && told.File != w.File {
		errs = append(errs, remove(told.File))
	}
	if told.isUp && !slices.Equal(told.Down, w.Down) {
		told.isUp, told.reason = false, "announce is configured otherwise"
		errs = append(errs, told.run(ctx))
	}
	if w.File != "" && w.isUp {
		errs = append(errs, create(w.File))
	} else if w.File != "" {
		errs = append(errs, remove(w.File))
	}
	return errors.Join(append(errs, w.run(ctx))...)
}

// run runs the program of o, if there is one.
func (o order) run(ctx context.Context) error {
	argv := o.Down
	if o.isUp {
		argv = o.Up
	}
	if len(argv) == 0 {
		return nil
	}
	return hook.Program{Argv: argv, Timeout: o.Timeout, Key: "announce.timeout",
		Env: map[string]string{"TAILSPLICE_LISTENER": o.Listener, "TAILSPLICE_STATE": state(o.isUp), "TAILSPLICE_REASON": o.reason}}.Run(ctx)
}

func state(isUp bool) string {
	if isUp {
		return "up"
	}
	return "down"
}

// create makes a file that everybody may read, by a rename, so that nobody sees an empty one.
func create(name string) error {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".")
	if err != nil {
		return fmt.Errorf("announce.file %s can't be created: %w", name, cause(err))
	}
	_, err = f.WriteString("up\n")
	err = errors.Join(err, f.Chmod(0o644), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		os.Remove(f.Name())
		return fmt.Errorf("announce.file %s can't be created: %w", name, cause(err))
	}
	return nil
}

func remove(name string) error {
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("announce.file %s can't be removed: %w", name, cause(err))
	}
	return nil
}

// cause is err without the path, which is said already.
func cause(err error) error {
	if path, ok := errors.AsType[*fs.PathError](err); ok {
		return path.Err
	}
	if link, ok := errors.AsType[*os.LinkError](err); ok {
		return link.Err
	}
	return err
}
