package server

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/tailsplice/tailsplice/userspace/container"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/wakelan"
)

// olderPause is how long a process that was upgraded waits before it looks again whether the older ones,
// which may use its containers, have ended.
const olderPause = time.Minute

const (
	// lanFirst bounds the first try where a machine may have to be woken: one that is awake answers sooner.
	lanFirst = time.Second
	// lanAgain is how soon a machine that has not answered yet gets another magic packet.
	lanAgain = 5 * time.Second
)

// wakes are the containers that this daemon has started, which it may stop, and who uses containers.
type wakes struct {
	mu sync.Mutex
	// +checklocks:mu
	started map[string]*woken // by id
	// +checklocks:mu
	uses map[string]*use // by the name in targets
	// +checklocks:mu
	machines map[string]time.Time // when a magic packet was sent last, by the address
	// +checklocks:mu
	collects bool // another process has got the list: what comes to it since goes to late
	// +checklocks:mu
	late []*woken
	// +checklocks:mu
	asleep chan struct{} // closed when all are stopped of which that has begun; nil: there are none
}

// woken is a container that was started here. It is what another process gets in [orders].
type woken struct {
	container.Started
	Idle time.Duration `json:"idle"` // how long it runs unused, nanoseconds
	Used time.Time     `json:"used"` // when it was last known to be

	timer *time.Timer
}

// use is who uses what a target's name stands for.
type use struct {
	count int
	last  time.Time // when the last one began or ended
}

func newWakes() *wakes {
	return &wakes{started: map[string]*woken{}, uses: map[string]*use{}, machines: map[string]time.Time{}}
}

// containerOf is what r's target calls a container, "" where it is none.
func containerOf(r *plan.Rule) string {
	if r.To.Scheme != dial.Docker {
		return ""
	}
	return r.To.Host
}

// begin notes that somebody uses what containerOf has named, until end is called. It is nil for "".
func (ws *wakes) begin(name string) (end func()) {
	if name == "" {
		return nil
	}
	ws.mu.Lock()
	defer ws.mu.Unlock()
	u := ws.uses[name]
	if u == nil {
		u = new(use)
		ws.uses[name] = u
	}
	u.count, u.last = u.count+1, time.Now()
	return sync.OnceFunc(func() {
		ws.mu.Lock()
		defer ws.mu.Unlock()
		if u.count, u.last = u.count-1, time.Now(); u.count == 0 && len(ws.started) == 0 {
			delete(ws.uses, name)
		}
	})
}

// wake starts the container that r leads to, if r says so and it does not run. The error says that it is not
// ready yet, or can't be started.
func (srv *Server) wake(ctx context.Context, r *plan.Rule) error {
	if !r.Wake.IsDocker() || r.To.Scheme != dial.Docker {
		return nil
	}
	began := time.Now()
	err := srv.containers.Wake(ctx, r.To.Host, func(s container.Started) { srv.noteStarted(s, r) })
	if err != nil {
		return r.Dialer.Explain(ctx, r.To, err, time.Since(began))
	}
	return nil
}

// wakeMachine sends the magic packet, if r has one and it was not sent a moment ago.
func (srv *Server) wakeMachine(ctx context.Context, r *plan.Rule) {
	if !r.Wake.IsLAN() || !srv.wakes.mayWake(r.Wake.LAN) {
		return
	}
	mac, err := net.ParseMAC(r.Wake.LAN)
	if err == nil {
		err = wakelan.Send(mac, machineAddrs(ctx, r))
	}
	if err != nil {
		srv.limited.Warn("wake "+r.Wake.LAN, "the magic packet that wakes a target's machine can't be sent", "route", r.Name, "target", r.Written, "mac", r.Wake.LAN, "err", err)
		return
	}
	srv.limited.Warn("woken "+r.Wake.LAN, "a magic packet was sent to wake a target's machine", "route", r.Name, "target", r.Written, "mac", r.Wake.LAN)
}

// mayWake reports whether a machine gets a magic packet now.
func (ws *wakes) mayWake(mac string) bool {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if time.Since(ws.machines[mac]) < lanAgain {
		return false
	}
	ws.machines[mac] = time.Now()
	return true
}

// machineAddrs are the addresses of r's targets that may be in a network of this host.
func machineAddrs(ctx context.Context, r *plan.Rule) (all []netip.Addr) {
	for _, to := range r.All {
		if to.To.Scheme != dial.TCP {
			continue
		}
		addrs, _ := net.DefaultResolver.LookupNetIP(ctx, "ip4", to.To.Host) // an address, too
		for _, a := range addrs {
			all = append(all, a.Unmap())
		}
	}
	return all
}

// noteStarted remembers a container that was started for r.
func (srv *Server) noteStarted(s container.Started, r *plan.Rule) {
	ws := srv.wakes
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if known := ws.started[s.ID]; known != nil {
		known.timer.Stop()
	}
	srv.log.Info("a container was started for a connection or a request", "container", s.Name, "target", r.Written, "idle", r.Wake.Idle.String())
	if r.Wake.Idle > 0 {
		ws.add(&woken{Started: s, Idle: r.Wake.Idle, Used: time.Now()}, srv.lapse)
		srv.opts.moved()
	}
}

// add has lapse called with w when nobody may have used it for long enough.
//
// +checklocks:ws.mu
func (ws *wakes) add(w *woken, lapse func(*woken)) {
	ws.started[w.ID] = w
	if ws.collects {
		ws.late = append(ws.late, &woken{Started: w.Started, Idle: w.Idle, Used: w.Used})
	}
	w.timer = time.AfterFunc(w.Idle-time.Since(w.Used), func() { lapse(w) })
}

// adopt remembers what another process has started. Who uses it may not be known here yet, so it counts as
// used until now.
func (ws *wakes) adopt(all []*woken, lapse func(*woken)) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	for _, w := range all {
		if known := ws.started[w.ID]; known != nil {
			if !w.isAfter(known) {
				continue
			}
			known.timer.Stop()
		}
		w.Used = time.Now()
		ws.add(w, lapse)
	}
}

// isAfter reports whether w is a later start of the same container as o.
func (w *woken) isAfter(o *woken) bool {
	at, err := time.Parse(time.RFC3339Nano, w.At)
	before, err2 := time.Parse(time.RFC3339Nano, o.At)
	return err == nil && err2 == nil && at.After(before)
}

// collect has what is started from now on kept for takeLate, or no more.
func (ws *wakes) collect(collects bool) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	ws.collects, ws.late = collects, nil
}

// mostLate bounds what takeLate returns: a message takes that.
const mostLate = 64

// takeLate returns the first of what was started since collect, without what it has returned before.
func (ws *wakes) takeLate() []*woken {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	n := min(len(ws.late), mostLate)
	late := slices.Clone(ws.late[:n])
	ws.late = ws.late[n:]
	return late
}

// putBack has takeLate return late again, which could not be told.
func (ws *wakes) putBack(late []*woken) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.collects {
		ws.late = slices.Concat(late, ws.late)
	}
}

// lapse stops w if nobody has used it for long enough, and else looks again when that may be so. While
// another process takes over, or has not handed over yet, that one may use it.
func (srv *Server) lapse(w *woken) {
	srv.mu.Lock()
	isOurs, isEarly := !srv.isClosed && !srv.hasLeft, srv.isHeld || srv.isFrozen
	srv.mu.Unlock()
	ws := srv.wakes
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if !isOurs || ws.started[w.ID] != w { // it is another process's now, or another start's
		return
	}
	left := time.Duration(0)
	if isEarly || ws.collects || srv.opts.Older != nil && srv.opts.Older() {
		w.Used, left = time.Now(), min(w.Idle, olderPause)
	}
	ws.noteUse(w, srv.containers.IDs)
	if left = max(left, w.Idle-time.Since(w.Used)); left > 0 {
		w.timer.Reset(left)
		return
	}
	ws.forget(w)
	srv.opts.moved()
	before, done := ws.asleep, make(chan struct{})
	ws.asleep = done
	go func() {
		defer close(done)
		srv.putToSleep(w)
		if before != nil {
			<-before
		}
	}()
}

// noteUse notes when w was used last. ids are the containers that a name stands for.
//
// +checklocks:ws.mu
func (ws *wakes) noteUse(w *woken, ids func(name string) []string) {
	for name, u := range ws.uses {
		// What a name stands for that stands for nothing now may be this one.
		if ids := ids(name); len(ids) > 0 && !slices.Contains(ids, w.ID) {
			continue
		}
		if u.count > 0 {
			u.last = time.Now()
		}
		if u.last.After(w.Used) {
			w.Used = u.last
		}
	}
}

// forget is for w, which is to be stopped. With the last of them, the uses that are over are of no interest.
//
// +checklocks:ws.mu
func (ws *wakes) forget(w *woken) {
	delete(ws.started, w.ID)
	if len(ws.started) > 0 {
		return
	}
	for name, u := range ws.uses {
		if u.count == 0 {
			delete(ws.uses, name)
		}
	}
}

// AwaitStops waits until no container is being stopped, or ctx ends: another process would take it for one
// that runs. While that one takes over none is begun to be stopped.
func (srv *Server) AwaitStops(ctx context.Context) {
	srv.wakes.mu.Lock()
	asleep := srv.wakes.asleep
	srv.wakes.mu.Unlock()
	if asleep == nil {
		return
	}
	select {
	case <-asleep:
	case <-ctx.Done():
	}
}

// putToSleep stops w.
func (srv *Server) putToSleep(w *woken) {
	stopped, err := srv.containers.Stop(srv.ctx, w.Started)
	switch {
	case err != nil:
		srv.log.Warn("a container that nobody has used can't be stopped", "container", w.Name, "idle", w.Idle.String(), "err", err)
	case stopped:
		srv.log.Info("a container was stopped: nobody has used it", "container", w.Name, "idle", w.Idle.String())
	default:
		srv.log.Info("a container that was started here is left alone: it was stopped, or started anew, by somebody else", "container", w.Name)
	}
}

// list returns what another process has to know.
func (ws *wakes) list() (all []*woken) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	for _, w := range ws.started {
		all = append(all, &woken{Started: w.Started, Idle: w.Idle, Used: time.Now()})
	}
	return all
}

// stop forgets all of them: they run on.
func (ws *wakes) stop() {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	for id, w := range ws.started {
		w.timer.Stop()
		delete(ws.started, id)
	}
}
