package server

import (
	"cmp"
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/tailsplice/tailsplice/userspace/balance"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/plan"
)

// A course is the order in which a connection tries the targets of a rule. Nothing has been sent to any of
// them.
type course struct {
	rule   *plan.Rule
	client netip.Addr // zero where it is not known
	tried  []*plan.Rule
	next   *plan.Rule // chosen, and not tried yet
	again  int        // so many of tried come once more behind the others
}

func (in *conn) newCourse(r *plan.Rule) *course {
	return &course{rule: r, client: in.visitor().Source()}
}

// peek returns the target that is to be tried next, nil if there is none.
func (c *course) peek() *plan.Rule {
	if c.next == nil {
		c.next = c.rule.Pick(c.client, c.tried)
	}
	if c.next == nil && c.again > 0 {
		c.next, c.again = c.tried[0], c.again-1
		c.tried = c.tried[1:]
	}
	return c.next
}

// take is peek for who tries the target now.
func (c *course) take() *plan.Rule {
	one := c.peek()
	if c.next = nil; one != nil {
		c.tried = append(c.tried, one)
	}
	return one
}

// takeBack has the target that was taken last come first again, and those before it behind the others.
func (c *course) takeBack() {
	last := len(c.tried) - 1
	c.next, c.tried, c.again = c.tried[last], c.tried[:last], last
}

// quickly is what a course that has failed took if some of its targets may just be restarting.
const quickly = time.Second

// tryTarget connects to r's target, or to one of several, which it returns as a rule with that one alone.
func (srv *Server) tryTarget(ctx context.Context, in *conn, r *plan.Rule) (*plan.Rule, net.Conn, error) {
	if r.Several == nil {
		up, err := srv.dialRule(ctx, in.listener.name, r, in.visitor())
		return r, up, err
	}
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(r.Dialer.Timeout, dial.DefaultTimeout))
	defer cancel()
	c := in.course
	in.course = nil
	if c == nil || c.rule != r {
		c = in.newCourse(r)
	}
	one, up, err := srv.raceTargets(ctx, in, c, true)
	if err != nil && time.Since(began) < quickly && ctx.Err() == nil {
		one, up, err = srv.raceTargets(ctx, in, in.newCourse(r), false)
	}
	return one, up, err
}

// raceTargets connects to the targets of c: the next is tried as soon as one fails, or beside those that are
// slow. once: one that fails quickly is not tried again.
func (srv *Server) raceTargets(ctx context.Context, in *conn, c *course, once bool) (*plan.Rule, net.Conn, error) {
	began := time.Now()
	lost := map[*plan.Rule]error{}
	var errs targetErrors
	race := balance.Race[*plan.Rule, net.Conn]{
		Next: func() (*plan.Rule, bool) {
			one := c.take()
			return one, one != nil
		},
		Delay: func(one *plan.Rule) time.Duration { return one.To.HeadStart() },
		Try: func(ctx context.Context, one *plan.Rule) (net.Conn, error) {
			if once {
				own, d := *one, *one.Dialer
				d.Once, own.Dialer = true, &d
				one = &own
			}
			return srv.dialRule(ctx, in.listener.name, one, in.visitor())
		},
		Close: func(up net.Conn) { up.Close() },
		Lost: func(one *plan.Rule, err error) {
			isSlow := err == balance.ErrSlow
			if isSlow {
				err = one.Dialer.Explain(ctx, one.To, err, time.Since(began))
			}
			errs = append(errs, err)
			if !isAvoided(one, err) {
				return
			}
			lost[one] = err
			if isSlow { // else dialRule has
				srv.noteFailed(in.listener.name, one, err)
			}
		},
	}
	one, up, ok := race.Run(ctx)
	if !ok {
		return c.rule, nil, errs
	}
	one.Health.Worked()
	for other, err := range lost {
		srv.limited.Warn("dial "+other.Written, lostText, lostAttrs(in, other, err)...)
	}
	return one, up, nil
}

// isAvoided notes that a connection goes on to another target than one, which has failed with err or is slow
// ([balance.ErrSlow]). It reports whether connections avoid it from now on.
func isAvoided(one *plan.Rule, err error) bool {
	switch {
	case !isFault(one, err):
		return false
	case errors.Is(err, balance.ErrSlow):
		return one.Health.Slow()
	}
	one.Health.Failed()
	return true
}

// isFault reports whether err, which a connection to r's target has failed with, tells others to avoid it.
// What a stranger can bring about does not, and a target that sees the client's own address may refuse that
// one alone.
func isFault(r *plan.Rule, err error) bool {
	de, ok := errors.AsType[*dial.Error](err)
	return !r.Transparent && tells(err) && !(ok && de.Reason == dial.OffByHand)
}

const lostText = "a target can't be reached: connections go to another one"

// lostAttrs say in the log which target in does not go to.
func lostAttrs(in *conn, one *plan.Rule, err error) []any {
	return []any{"id", in.id, "listener", in.listener.name, "route", one.Name, "target", one.Written,
		"client", in.client, "name", in.name, "err", err}
}

// targetErrors is why no target of a rule can be reached.
type targetErrors []error

func (e targetErrors) Error() string {
	var all []string
	for _, err := range e {
		all = append(all, err.Error())
	}
	return strings.Join(all, "; ")
}

// Unwrap returns the errors of all targets that were tried.
func (e targetErrors) Unwrap() []error { return e }
