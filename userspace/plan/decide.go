package plan

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/tailsplice/tailsplice/userspace/sni"
	"github.com/tailsplice/tailsplice/userspace/tailnet"
)

// Visitor is who is at the other end of a connection or a request.
type Visitor struct {
	Client  netip.Addr
	Unknown error // why Client is not the client, nil if it is
}

// Source is whose limits v counts for: the zero Addr where that is not known.
func (v Visitor) Source() netip.Addr {
	if v.Unknown != nil {
		return netip.Addr{}
	}
	return v.Client
}

// Asker says who has an address of the tailnet.
type Asker interface {
	// WhoIs returns the identity. The error is a *[NotIdentifiedError], or wraps [tailnet.ErrNotPeer].
	WhoIs(netip.Addr) (tailnet.Identity, error)
	// Describe names the owner of an address for people, in the log.
	Describe(netip.Addr) string
}

// The errors of Decide, beside those of Permit.
var (
	ErrNobodyServes = errors.New("no route and no default matches this name")
	ErrRejectedName = errors.New("the configuration rejects this name")
	ErrRejected     = errors.New("the configuration rejects all connections")
)

// Decide says which rule takes a connection of v with this hello, which is nil on a tcp listener, or why none
// does. Only q may wait, and remember: with equal answers of it the decision is the same.
func (s *Service) Decide(hello *sni.Hello, v Visitor, q Asker) (*Rule, error) {
	if hello == nil {
		r := s.Fallback
		if r == nil {
			return nil, ErrRejected
		}
		if err := Permit(v, q, s.Allow, r.Allow); err != nil {
			return nil, err
		}
		if r.Reject {
			return nil, ErrRejected
		}
		return r, nil
	}
	if err := Permit(v, q, s.Allow); err != nil {
		return nil, err
	}
	r := s.byHello(hello)
	switch {
	case r == nil:
		return nil, ErrNobodyServes
	case r.Reject:
		return nil, fmt.Errorf("%w (route %s)", ErrRejectedName, r.Name)
	}
	if err := Permit(v, q, r.Allow); err != nil {
		return nil, fmt.Errorf("%w (route %s)", err, r.Name)
	}
	return r, nil
}

// Permit checks v against each of the allow lists that is not nil. The error is
// a *[NotAllowedError] or a *[NotIdentifiedError].
func Permit(v Visitor, q Asker, lists ...*Peers) error {
	for _, allow := range lists {
		if allow == nil {
			continue
		}
		ok, err := false, v.Unknown
		if err == nil {
			ok, err = allow.Contains(v.Client, q.WhoIs)
		}
		switch {
		case errors.As(err, new(*NotIdentifiedError)):
			return err
		case err != nil:
			return &NotAllowedError{"unknown: " + err.Error()}
		case !ok:
			return &NotAllowedError{q.Describe(v.Client)}
		}
	}
	return nil
}

// NotAllowedError says that no allow list names a visitor.
type NotAllowedError struct{ Who string }

func (e *NotAllowedError) Error() string { return "allow does not name " + e.Who }

// NotIdentifiedError says that tailscaled did not answer who has an address.
type NotIdentifiedError struct {
	Addr netip.Addr
	Err  error
}

func (e *NotIdentifiedError) Error() string {
	return fmt.Sprintf("tailscaled did not answer who %s is: %v", e.Addr, e.Err)
}

func (e *NotIdentifiedError) Unwrap() error { return e.Err }
