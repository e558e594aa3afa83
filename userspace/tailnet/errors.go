package tailnet

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"tailscale.com/client/local"

	"github.com/tailsplice/tailsplice/userspace/follow"
)

// Kind says what failed, for those who count or decide.
type Kind string

const (
	// KindAbsent: tailscaled can't be asked: not running, no permission, or it doesn't answer.
	KindAbsent Kind = "no_tailscaled"
	// KindDown: tailscaled runs, but this machine isn't on its tailnet; [Error].State tells the state.
	KindDown        Kind = "tailscale_down"
	KindUnknownNode Kind = "unknown_node" // no node has that name or address
)

// ErrNotPeer is wrapped by [Client.WhoIs]'s error for an address of no node: a stranger, not a failure.
var ErrNotPeer = errors.New("not the address of a tailnet node")

// ErrMustAsk is the error of [Client.Known] for an address that tailscaled must be asked about.
var ErrMustAsk = errors.New("tailscaled has not been asked yet")

// Error tells people what to do; programs look at its Kind.
type Error struct {
	Kind   Kind
	Socket string // tailscaled's; "" for KindUnknownNode
	State  string // tailscaled's state for KindDown ("NeedsLogin", "Stopped", ...)
	Node   string // the name asked for, if there was one
	Err    error  // the cause, or nil

	msg       string
	temporary bool // worth another try soon
	hangs     bool // the daemon is there and doesn't answer
}

// Error returns a message for people, with what to do.
func (e *Error) Error() string   { return e.msg }
func (e *Error) Unwrap() error   { return e.Err }
func (e *Error) Reason() string  { return string(e.Kind) }
func (e *Error) Temporary() bool { return e.temporary } // it may pass within seconds by itself

// socketError explains why nothing answered at socket.
func socketError(socket string, err error) *Error {
	e := &Error{Kind: KindAbsent, Socket: socket, Err: err}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.msg = fmt.Sprintf("no tailscaled: there is no socket %s; install Tailscale and start it (systemctl enable --now tailscaled), then `tailscale up`; "+
			"%s names another socket", socket, SocketEnv)
	case errors.Is(err, syscall.ECONNREFUSED):
		e.msg = fmt.Sprintf("no tailscaled: nothing listens on the socket %s; start it (systemctl start tailscaled)", socket)
	case errors.Is(err, fs.ErrPermission):
		e.msg = fmt.Sprintf("no permission to use tailscaled's socket %s as user %d: run as root, or let this user in "+
			"(tailscale set --operator=USER, and access to the socket's folder)", socket, os.Getuid())
	case follow.IsTimeout(err):
		e.msg, e.hangs = fmt.Sprintf("tailscaled at %s does not answer", socket), true
	default:
		e.msg = fmt.Sprintf("connect to tailscaled at %s: %v", socket, err)
	}
	return e
}

// localError explains a failed LocalAPI request.
func localError(socket string, err error) error {
	switch own, ok := errors.AsType[*Error](err); {
	case err == nil:
		return nil
	case ok:
		return own
	case local.IsAccessDeniedError(err):
		return &Error{Kind: KindAbsent, Socket: socket, Err: err, msg: fmt.Sprintf("tailscaled at %s refuses user %d: run as root, or let this user in "+
			"(tailscale set --operator=USER)", socket, os.Getuid())}
	}
	return socketError(socket, err)
}
