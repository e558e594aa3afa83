// Package transparent makes connections that carry the client's own address, so that a container sees the
// client on its socket though it speaks with this host.
//
// The connection's socket is bound to the client's address (IP_TRANSPARENT), and its port is the kernel's
// choice. What the container answers is addressed to the client: it must come by this host, which is so where
// this host is the container's default gateway, and this host must keep it. That is what a [ReturnPath] is:
//
//	nftables, prerouting   packets of such sockets get a mark
//	ip rule                the mark leads to a routing table of our own
//	that table             everything is delivered here
//
// It touches no packet of anything else, and works beside the rules of Docker, tailscaled and firewalls. What
// a killed daemon leaves does nothing, for no socket has packets any more, and the next one takes it away.
//
// It needs Linux 4.18 with nf_tables and nft_socket, and CAP_NET_ADMIN.
//
// Its files:
//
//	transparent.go        why it can't be done
//	return_path_linux.go  nftables, rules, a routing table; and whether they can be had
//	socket_linux.go       a socket with the client's address
//	other.go              elsewhere than on Linux
package transparent

import "fmt"

// Reason says why a connection can't carry the client's address.
type Reason string

const (
	Unavailable   Reason = "unavailable"    // there is no ReturnPath
	Family        Reason = "family"         // the client is IPv4 and the target IPv6, or the reverse
	ClientAddress Reason = "client_address" // it means nothing to another host: loopback, link-local
	// the target is an address of this host: its answers don't come in from outside
	TargetHere Reason = "target_here"
	// the client is reached by the network of the target, and so are the answers
	SameNetwork Reason = "same_network"
)

// Error is why a connection can't carry the client's address.
type Error struct {
	Reason Reason
	text   string
}

// Error returns a message for people.
func (e *Error) Error() string { return e.text }

func no(r Reason, format string, args ...any) error { return &Error{r, fmt.Sprintf(format, args...)} }
