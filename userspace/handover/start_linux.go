package handover

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// environ names the descriptor of the new process's end; the next one is what it writes to when it serves.
const environ = "TAILSPLICE_HANDOVER"

// Program is what [Start] starts.
type Program struct {
	Path string
	Args []string // without the program's name
	// Sibling makes it a child of this process's parent, which has to wait for its end: a supervisor
	// that goes on with it.
	Sibling bool
	Stderr  *os.File          // where the new process writes when it serves
	Lines   func(line []byte) // is given each line that it writes before
}

// Successor is a new process, as the old one sees it. It has to be let go, or killed.
type Successor struct {
	*Link
	PID int

	process *os.Process
	gone    chan struct{} // closed when it has ended
	state   *os.ProcessState
	said    tail

	oomBefore string // oom_score_adj before risk; "": it is that of this process
}

// Start starts a program that is to take over.
func Start(p Program) (*Successor, error) {
	ours, theirs, err := pair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	r, w, err := os.Pipe()
	if err != nil {
		ours.Close()
		return nil, err
	}
	defer w.Close()
	pidfd := -1
	cmd := exec.Command(p.Path, p.Args...)
	cmd.Env = append(os.Environ(), environ+"=3")
	cmd.ExtraFiles = []*os.File{theirs, p.Stderr}
	cmd.Stdout, cmd.Stderr = os.Stdout, w
	cmd.SysProcAttr = &syscall.SysProcAttr{PidFD: &pidfd}
	if p.Sibling {
		cmd.SysProcAttr.Cloneflags = unix.CLONE_PARENT
	}
	if err := cmd.Start(); err != nil {
		ours.Close()
		r.Close()
		return nil, err
	}
	s := &Successor{Link: ours, PID: cmd.Process.Pid, process: cmd.Process, gone: make(chan struct{})}
	s.said.done = make(chan struct{})
	s.risk()
	go s.said.read(r, p.Lines)
	go func() {
		defer close(s.gone)
		awaitEnd(pidfd)
		s.state, _ = s.process.Wait() // of a sibling another process learns it
	}()
	return s, nil
}

// awaitEnd waits until a process has ended, and closes its descriptor.
func awaitEnd(pidfd int) {
	defer unix.Close(pidfd)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, -1)
		if n > 0 || err != unix.EINTR {
			return
		}
	}
}

// Gone is closed when the process has ended.
func (s *Successor) Gone() <-chan struct{} { return s.gone }

// State is how it has ended, once it is gone; nil: its parent knows.
func (s *Successor) State() *os.ProcessState { return s.state }

// Await waits for a step. Where it does not come within the time, or before ctx ends, the process is to be
// killed: the error says what it wrote last.
func (s *Successor) Await(ctx context.Context, step string, within time.Duration) (*Message, error) {
	deadline := time.Now().Add(within)
	for {
		m, err := s.receive(ctx, deadline)
		switch {
		case err == nil && m.Step == step:
			Close(m.Sockets)
			return m, nil
		case err == nil: // a step that this program does not know
			Close(m.Sockets)
			continue
		case ctx.Err() != nil:
			return nil, fmt.Errorf("given up: %w", context.Cause(ctx))
		case errors.Is(err, os.ErrDeadlineExceeded):
			err = fmt.Errorf("it was not %s after %s: it hangs, waits for something, or is a program that can't take over", step, within)
		case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
			err = s.explainEnd()
		default:
			err = fmt.Errorf("it sends what makes no sense (%w): it is a program that can't take over", err)
		}
		if said := s.said.String(); said != "" {
			err = fmt.Errorf("%w; it wrote:\n%s", err, said)
		}
		return nil, err
	}
}

func (s *Successor) receive(ctx context.Context, deadline time.Time) (*Message, error) {
	type result struct {
		m   *Message
		err error
	}
	got := make(chan result, 1)
	go func() {
		m, err := s.Receive(deadline)
		got <- result{m, err}
	}()
	select {
	case r := <-got:
		return r.m, r.err
	case <-ctx.Done():
		for {
			s.interrupt()
			select {
			case r := <-got:
				return r.m, r.err
			case <-time.After(10 * time.Millisecond): // it had not begun
			}
		}
	}
}

// Lasts waits so long for the end of a process that serves, which its connection tells before anybody can
// know of it otherwise. An error says how it has ended.
func (s *Successor) Lasts(within time.Duration) error {
	if !s.awaitClose(within) {
		return nil
	}
	return s.explainEnd()
}

// explainEnd says how a process has ended whose end of the connection is closed.
func (s *Successor) explainEnd() error {
	select {
	case <-s.gone:
	case <-time.After(time.Second):
		return errors.New("it has closed its connection to this daemon: it is a program that can't take over")
	}
	select {
	case <-s.said.done:
	case <-time.After(time.Second): // another process has the pipe, too
	}
	if s.state == nil {
		return errors.New("it ended")
	}
	return fmt.Errorf("it ended: %v", s.state)
}

// killAfter is how long a process that is asked to end may take to it.
const killAfter = 2 * time.Second

// End has the process end, as it does when its predecessor is gone, or kills it. It returns when it is gone.
func (s *Successor) End() {
	s.Close()
	s.process.Signal(syscall.SIGTERM)
	select {
	case <-s.gone:
	case <-time.After(killAfter):
		s.Kill()
	}
}

// Kill kills the process, and returns when it is gone. The connection is closed after that: by its end a
// process that serves would know that this one is gone, and go on with its flows.
func (s *Successor) Kill() {
	s.process.Kill()
	<-s.gone
	s.Close()
}

// Signal sends the process a signal.
func (s *Successor) Signal(sig os.Signal) error { return s.process.Signal(sig) }

// tail keeps the last lines of what a process writes.
type tail struct {
	done chan struct{} // closed at its end

	mu sync.Mutex
	// +checklocks:mu
	lines []string
}

const (
	tailLines = 20
	lineBytes = 64 << 10
)

// read reads r to its end, and closes it.
func (t *tail) read(r *os.File, each func([]byte)) {
	defer close(t.done)
	defer r.Close()
	in := bufio.NewReaderSize(r, lineBytes)
	for {
		line, err := in.ReadSlice('\n') // a longer one comes in parts
		if len(line) > 0 {
			each(line)
			t.mu.Lock()
			t.lines = append(t.lines, strings.TrimRight(string(line), "\n"))
			t.lines = t.lines[max(0, len(t.lines)-tailLines):]
			t.mu.Unlock()
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.Join(t.lines, "\n")
}
