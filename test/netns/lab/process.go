package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Process is a program that keeps running on a host, with its output in a log file.
type Process struct {
	Name string // of the program and its log file
	Log  string // path of the log file: stdout and stderr, appended to by restarts
	Host *Host

	mu   sync.Mutex
	cmd  *Cmd
	done chan struct{}
	err  error // of Wait, once done is closed
}

// StartProcess starts argv on the host as a long-running process. prepare, if any, may change the command
// before the start. The world stops it when it ends.
func (h *Host) StartProcess(name string, argv []string, prepare func(*Cmd)) (*Process, error) {
	p := &Process{Name: name, Log: filepath.Join(h.Dir, "log", name+".log"), Host: h}
	if err := p.start(argv, prepare); err != nil {
		return nil, err
	}
	h.mu.Lock()
	h.procs = append(h.procs, p)
	h.mu.Unlock()
	return p, nil
}

func (p *Process) start(argv []string, prepare func(*Cmd)) error {
	log, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := p.Host.Command(context.Background(), argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	if prepare != nil {
		prepare(cmd)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s on %s: %w", p.Name, p.Host.Name, err)
	}
	done := make(chan struct{})
	p.mu.Lock()
	p.cmd, p.done, p.err = cmd, done, nil
	p.mu.Unlock()
	go func() {
		err := cmd.Wait()
		p.mu.Lock()
		p.err = err
		p.mu.Unlock()
		close(done)
	}()
	return nil
}

// Pid is the process's id on this machine.
func (p *Process) Pid() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cmd.Process.Pid
}

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.done
}

// Wait waits for the end of the process, and returns its [os/exec.ExitError] if it failed.
func (p *Process) Wait() error {
	<-p.Done()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// Running says whether the process has not ended.
func (p *Process) Running() bool {
	select {
	case <-p.Done():
		return false
	default:
		return true
	}
}

// Signal sends a signal; a process that has ended is an error.
func (p *Process) Signal(sig os.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cmd.Process.Signal(sig)
}

// Kill ends the process with SIGKILL, and waits for it.
func (p *Process) Kill() {
	p.Signal(syscall.SIGKILL)
	<-p.Done()
}

// Stop ends the process with SIGTERM, or after the grace with SIGKILL, and waits for it. It says whether
// SIGTERM was enough.
func (p *Process) Stop(grace time.Duration) bool {
	if err := p.Signal(syscall.SIGTERM); errors.Is(err, os.ErrProcessDone) {
		<-p.Done()
		return true
	}
	select {
	case <-p.Done():
		return true
	case <-time.After(grace):
		p.Kill()
		return false
	}
}

// Output is what the process has written to its log so far.
func (p *Process) Output() string {
	b, _ := os.ReadFile(p.Log)
	return string(b)
}

// tail is the end of the log, for messages.
func (p *Process) tail(lines int) string {
	all := strings.Split(strings.TrimRight(p.Output(), "\n"), "\n")
	if len(all) > lines {
		all = all[len(all)-lines:]
	}
	return strings.Join(all, "\n")
}

// waitFor polls ok every 10 ms until it says nil, the process ends or ctx does; the error then carries the
// end of the log.
func (p *Process) waitFor(ctx context.Context, what string, ok func() error) error {
	done := p.Done()
	for {
		err := ok()
		if err == nil {
			return nil
		}
		select {
		case <-done:
			return fmt.Errorf("%s on %s ended before it was %s: %v\n%s", p.Name, p.Host.Name, what, p.Wait(), p.tail(30))
		case <-ctx.Done():
			return fmt.Errorf("%s on %s is not %s in time: %w\n%s", p.Name, p.Host.Name, what, err, p.tail(30))
		case <-time.After(10 * time.Millisecond):
		}
	}
}
