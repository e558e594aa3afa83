package dial

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"
	"time"
)

// Reason says why a dial failed, to count or decide by. A [Resolver] may have others than these.
type Reason string

const (
	NoTailscaled         Reason = "no_tailscaled"         // tailscaled can't be asked
	TailscaleDown        Reason = "tailscale_down"        // it runs, but this machine isn't on its tailnet
	UnknownNode          Reason = "unknown_node"          // no such node
	NodeOffline          Reason = "node_offline"          // no answer from a node that is offline
	NoDockerd            Reason = "no_dockerd"            // the Docker daemon can't be asked
	UnknownContainer     Reason = "unknown_container"     // no such container or service
	AmbiguousContainer   Reason = "ambiguous_container"   // a service of several projects
	ContainerStopped     Reason = "container_stopped"     // it is there, and does not run
	ContainerUnreachable Reason = "container_unreachable" // it has no address that this host can reach
	// it was started, and has yet to pass its health check
	ContainerStarting   Reason = "container_starting"
	ContainerNotStarted Reason = "container_not_started" // it could not be started
	DNS                 Reason = "dns"                   // the host name has no address
	Refused             Reason = "refused"               // nothing listens there
	Timeout             Reason = "timeout"               // no answer
	Unreachable         Reason = "unreachable"           // no way there
	NoSocket            Reason = "no_socket"             // there is no such unix socket
	Denied              Reason = "denied"                // no permission
	Exhausted           Reason = "exhausted"             // out of file descriptors, ports or memory here
	OffByHand           Reason = "disabled"              // by an operator
	Canceled            Reason = "canceled"              // the caller gave up
	Failed              Reason = "failed"                // anything else
)

// Error is why [Dialer.Dial] failed.
type Error struct {
	Target Target
	Addr   string // the address or path tried, the more telling one of two; "" if none was
	Reason Reason
	Seen   time.Time // when a node that is offline was last seen; zero if unknown
	Err    error     // the cause

	msg string
}

// Error returns a message for people, with what to do where that is known.
func (e *Error) Unwrap() error { return e.Err }
func (e *Error) Error() string { return "dial " + e.Target.String() + ": " + e.msg }

// Timeout reports whether the upstream, or a resolver, did not answer in time: an HTTP gateway's 504.
func (e *Error) Timeout() bool { return e.Reason == Timeout || e.Reason == NodeOffline }

var (
	errNoResolver = errors.New("targets of this kind are not set up")
	errScheme     = errors.New("unknown kind of target")
)

// ErrSelf is that a connection is one of a socket with itself. TCP allows that, and it comes about where
// nobody listens on a port of this host that is also one of those that connections are made from.
var ErrSelf error = selfError{}

type selfError struct{}

func (selfError) Error() string {
	return "nothing listens there, and the port is one that this host uses for outgoing connections (net.ipv4.ip_local_port_range), so the " +
		"socket was connected to itself: start what should listen, and add the port to net.ipv4.ip_local_reserved_ports"
}

func (selfError) Is(err error) bool { return err == syscall.ECONNREFUSED }

// failure is what came of one attempt.
type failure struct {
	err   error
	addr  string // what was tried, or ""
	again bool   // worth another try soon
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

// lesser reports whether o tells more than f: an answer, even a bad one, says more than none or no way.
func (f *failure) lesser(o *failure) bool { return f.rank() < o.rank() }

func (f *failure) rank() int {
	switch reasonOf(f.err) {
	case Unreachable:
		return 0
	case Timeout:
		return 1
	case Refused:
		return 3
	}
	return 2
}

// quickKind reports whether err is one that a restart of the upstream causes.
func quickKind(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EHOSTUNREACH) ||
		errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.EAGAIN)
}

// reasonOf translates what the system or a resolver said.
func reasonOf(err error) Reason {
	var own interface{ Reason() string }
	var timeout net.Error
	switch {
	case errors.As(err, &own):
		return Reason(own.Reason())
	case errors.Is(err, context.Canceled):
		return Canceled
	case errors.As(err, new(*net.DNSError)):
		return DNS
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.EAGAIN): // a unix socket's full backlog
		return Refused
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.EHOSTDOWN),
		errors.Is(err, syscall.ENETDOWN), errors.Is(err, syscall.EADDRNOTAVAIL) && toIPv6(err):
		// no IPv6 here; else the ports ran out
		return Unreachable
	case errors.Is(err, fs.ErrPermission):
		return Denied
	case errors.Is(err, fs.ErrNotExist):
		return NoSocket
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.ENOBUFS), errors.Is(err, syscall.ENOMEM),
		errors.Is(err, syscall.EADDRNOTAVAIL):
		return Exhausted
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return Timeout
	}
	return Failed
}

// toIPv6 reports whether err is of a connection to an IPv6 address.
func toIPv6(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	if !ok {
		return false
	}
	to, ok := op.Addr.(*net.TCPAddr)
	return ok && to.IP.To4() == nil
}

// explain makes the error that the caller sees.
func (d *Dialer) explain(ctx context.Context, t Target, f *failure, took time.Duration) *Error {
	e := &Error{Target: t, Addr: f.addr, Reason: reasonOf(f.err), Err: f.err}
	if errors.Is(ctx.Err(), context.Canceled) {
		e.Reason = Canceled
	}
	e.msg = e.message(took.Round(100 * time.Millisecond))
	if e.Reason == Timeout || e.Reason == Unreachable {
		d.addPresence(e)
	}
	return e
}

// message says what went wrong, and what to do where that is known.
func (e *Error) message(waited time.Duration) string {
	t, err, at := e.Target, e.Err, ""
	if e.Addr != "" && t.Scheme != Unix && e.Addr != t.String() {
		at = " at " + e.Addr
	}
	switch e.Reason {
	case Timeout:
		if e.Addr == "" {
			return fmt.Sprintf("%s was not resolved within %s", t.Host, waited)
		}
		return fmt.Sprintf("no answer%s within %s", at, waited)
	case Refused:
		switch {
		case errors.Is(err, syscall.EAGAIN):
			return "the target does not keep up: its queue of new connections is full"
		case errors.Is(err, ErrSelf):
			return fmt.Sprintf("the target refused the connection%s: %v", at, ErrSelf)
		}
		return fmt.Sprintf("the target refused the connection%s: nothing listens there", at)
	case Unreachable:
		return fmt.Sprintf("no route%s: %v", at, cause(err))
	case DNS:
		return dnsMessage(t.Host, err)
	case NoSocket:
		return "there is no such socket"
	case Denied:
		if t.Scheme == Unix {
			return fmt.Sprintf("user %d may not write to the socket: put the daemon in the socket's group (SupplementaryGroups= in its unit), or change the socket's mode", os.Getuid())
		}
		return fmt.Sprintf("no permission to connect%s: a firewall rule of this machine forbids it", at)
	case Exhausted:
		return fmt.Sprintf("this machine is out of files, ports or memory: %v", cause(err))
	case Canceled:
		return "canceled by the caller"
	case Failed:
		switch {
		case errors.Is(err, errNoResolver):
			return t.Scheme + " targets are not available here"
		case errors.Is(err, errScheme):
			return fmt.Sprintf("unknown kind of target %q", t.Scheme)
		}
		return fmt.Sprintf("failed%s: %v", at, cause(err))
	}
	return err.Error() // a resolver's own, which says it all
}

// addPresence adds what is known of a machine that doesn't answer.
func (d *Dialer) addPresence(e *Error) {
	presence, ok := d.resolver(e.Target).(Presence)
	if !ok {
		return
	}
	online, seen, known := presence.Presence(e.Target.Host)
	switch {
	case !known:
		return
	case online:
		e.msg += fmt.Sprintf("; %s is online, so look for a firewall or an access rule of the tailnet that drops this port", e.Target.Host)
		return
	case seen.IsZero():
		e.Reason = NodeOffline
		e.msg += fmt.Sprintf("; %s is offline", e.Target.Host)
	default:
		e.Reason, e.Seen = NodeOffline, seen
		e.msg += fmt.Sprintf("; %s is offline, last seen %s ago", e.Target.Host, age(time.Since(seen)))
	}
	if namesakes, ok := presence.(Namesake); ok {
		if other := namesakes.Namesake(e.Target.Host); other != "" {
			e.msg += fmt.Sprintf("; %s is online: if it is the same machine, set up anew, name that one, or remove %s from the tailnet and rename it", other, e.Target.Host)
		}
	}
}

// age is d in the unit that people would use.
func age(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%d s", max(0, int(d.Seconds())))
	case d < time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}

// cause is the innermost part of what the net package says.
func cause(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Err != nil {
		err = op.Err
	}
	if number, ok := errors.AsType[syscall.Errno](err); ok {
		return number
	}
	return err
}

func dnsMessage(host string, err error) string {
	dns, _ := errors.AsType[*net.DNSError](err)
	server := ""
	if dns.Server != "" {
		server = " (asked " + dns.Server + ")"
	}
	switch {
	case dns.IsNotFound:
		msg := fmt.Sprintf("the host name %s has no address%s", host, server)
		if strings.HasSuffix(strings.ToLower(strings.TrimSuffix(host, ".")), ".local") {
			msg += ": names in .local use multicast DNS, which is not supported; use its address, or a name that the name server or /etc/hosts has"
		}
		return msg
	case dns.IsTimeout:
		return fmt.Sprintf("the name server did not answer for %s%s", host, server)
	}
	if strings.HasSuffix(dns.Err, syscall.ECONNREFUSED.Error()) {
		return fmt.Sprintf("look up %s: no name server listens there%s", host, server)
	}
	return fmt.Sprintf("look up %s: %s%s", host, strings.TrimSpace(dns.Err), server)
}
