package container

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"github.com/tailsplice/tailsplice/userspace/follow"
)

// Kind says what failed, for those who count or decide.
type Kind string

const (
	// KindAbsent: the Docker daemon can't be asked: not running, no permission, or it doesn't answer.
	KindAbsent      Kind = "no_dockerd"
	KindUnknown     Kind = "unknown_container"     // no container or service has that name
	KindAmbiguous   Kind = "ambiguous_container"   // several Compose projects have a service of that name
	KindStopped     Kind = "container_stopped"     // the container, or all of the service's, is not running
	KindUnreachable Kind = "container_unreachable" // it runs, and has no address that this host can reach
	KindStarting    Kind = "container_starting"    // it runs, and has yet to pass its health check
	KindNotStarted  Kind = "container_not_started" // Docker would not, or could not, start it
)

// Error tells people what to do; programs look at its Kind.
type Error struct {
	Kind    Kind
	Host    string    // the daemon's address, for KindAbsent
	Name    string    // the name asked for, if there was one
	Stopped time.Time // for KindStopped: since when; zero if never started or not known
	Err     error     // the cause, or nil

	msg       string
	temporary bool
	hangs     bool // it was asked, and does not answer
	stopped   *one
}

// Error returns a message for people, with what to do.
func (e *Error) Error() string   { return e.msg }
func (e *Error) Unwrap() error   { return e.Err }
func (e *Error) Reason() string  { return string(e.Kind) }
func (e *Error) Temporary() bool { return e.temporary } // it may pass within seconds by itself

// dialFailed carries an *Error through the Docker client, which has its own text for some system errors.
type dialFailed struct{ e *Error }

func (d dialFailed) Error() string { return d.e.msg }

// As makes errors.As find the *Error; there is no Unwrap for a reason.
func (d dialFailed) As(target any) bool {
	if p, ok := target.(**Error); ok {
		*p = d.e
		return true
	}
	return false
}

// socketError explains why nothing answered at the socket path.
func socketError(path string, err error) *Error {
	e := &Error{Kind: KindAbsent, Host: "unix://" + path, Err: err}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.msg = fmt.Sprintf("no Docker daemon: there is no socket %s; install Docker and start it (systemctl enable --now docker); %s names another",
			path, client.EnvOverrideHost)
	case errors.Is(err, syscall.ECONNREFUSED):
		e.msg = fmt.Sprintf("no Docker daemon: nothing listens on the socket %s; start it (systemctl start docker)", path)
	case errors.Is(err, fs.ErrPermission):
		e.msg = fmt.Sprintf("no permission to use Docker's socket %s as user %d: run as root, or add the user to the group that owns the socket "+
			"(usermod -aG docker USER), which makes it as powerful as root", path, os.Getuid())
	default:
		e.msg = fmt.Sprintf("connect to Docker at %s: %v", path, err)
	}
	return e
}

// apiError explains a failed request.
func apiError(host, what string, err error) *Error {
	if own, ok := errors.AsType[*Error](err); ok {
		return own
	}
	e := &Error{Kind: KindAbsent, Host: host, Err: err}
	e.msg = fmt.Sprintf("docker at %s: %s: %v", host, what, err)
	if follow.IsTimeout(err) {
		e.hangs, e.msg = true, fmt.Sprintf("docker at %s does not answer: %s", host, what)
	}
	return e
}

// describe asks since when e's container is stopped, says so in e, and judges whether a restart is under way.
func (c *Client) describe(ctx context.Context, e *Error) {
	o := e.stopped
	switch o.state {
	case container.StatePaused:
		e.msg = fmt.Sprintf("container %q is paused: resume it (docker unpause %s)", o.name, o.name)
		return
	case container.StateCreated:
		e.msg = fmt.Sprintf("container %q was never started: start it (docker start %s)", o.name, o.name)
		return
	}
	e.temporary = o.state == container.StateRestarting
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	got, err := c.now().api.ContainerInspect(ctx, o.id, client.ContainerInspectOptions{})
	if err != nil || got.Container.State == nil {
		return // what e says already is true
	}
	s := got.Container.State
	since, err := time.Parse(time.RFC3339Nano, s.FinishedAt)
	if err != nil || since.IsZero() {
		return
	}
	e.Stopped = since
	age := time.Since(since).Truncate(time.Second)
	if o.state == container.StateRestarting {
		e.msg = fmt.Sprintf("container %q exits again and again: Docker is restarting it, last exit %s ago with code %d (docker logs %s)",
			o.name, age, s.ExitCode, o.name)
		return
	}
	e.temporary = time.Since(since) < restartWait
	e.msg = fmt.Sprintf("container %q is stopped since %s (%s ago, exit code %d): start it (docker start %s)",
		o.name, since.Local().Format("2006-01-02 15:04:05"), age, s.ExitCode, o.name)
}
