package server

import (
	"errors"
	"fmt"
	"io"
	"math"
	"mime"
	"net/http"
	"strconv"
	"unicode/utf8"

	"github.com/tailsplice/tailsplice/userspace/auth"
	"github.com/tailsplice/tailsplice/userspace/limit"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/tailnet"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

func (in *conn) visitor() plan.Visitor {
	return plan.Visitor{Client: in.client.Addr(), Unknown: in.unknown}
}

func visitorOf(v *vhost.Visit) plan.Visitor {
	return plan.Visitor{Client: v.Client.Addr(), Unknown: v.Unknown}
}

// listenerGuard is asked about each request to l, before it is routed.
func (srv *Server) listenerGuard(l *listener) vhost.Guard {
	return func(_ http.ResponseWriter, v *vhost.Visit) error {
		err := srv.allowRequest(l.name, v, l.service.Load().Allow)
		srv.nameVisitor(v) // also of one who is refused, for the access log
		return err
	}
}

// nameVisitor tells the upstream of a request from the tailnet who it is from, as `tailscale serve` does:
// users have a name, tagged nodes have none.
func (srv *Server) nameVisitor(v *vhost.Visit) {
	client := v.Client.Addr()
	if v.Unknown != nil || !tailnet.Contains(client) {
		return
	}
	id, err := v.Conn.Hops.(*asker).whoIsWithin(nameWait, client)
	if err != nil || id.User == "" {
		return
	}
	v.User = id.User
	v.SetHeader("Tailscale-User-Login", headerText(id.User))
	v.SetHeader("Tailscale-User-Name", headerText(id.DisplayName))
	v.SetHeader("Tailscale-User-Profile-Pic", id.ProfilePic)
	v.SetHeader("Tailscale-Headers-Info", "https://tailscale.com/s/serve-headers")
}

// headerText is v in a header: as it is if that is ASCII, else by RFC 2047.
func headerText(v string) string {
	if !utf8.ValidString(v) {
		return ""
	}
	return mime.QEncoding.Encode("utf-8", v)
}

// allowRequest refuses a request that allow does not name, or on a connection whose PROXY header is not
// believed any more, or is missing now.
func (srv *Server) allowRequest(listener string, v *vhost.Visit, allow *plan.Peers) error {
	err := v.Unknown
	if !is[*strangerError](err) && !errors.Is(err, errNoHeader) {
		err = plan.Permit(visitorOf(v), v.Conn.Hops.(*asker), allow)
	}
	if err == nil {
		return nil
	}
	reason := refusal(err)
	if v.Request.Context().Err() == nil {
		srv.requestRefused(listener, v, reason, err)
	}
	no := &vhost.Refusal{Status: http.StatusForbidden, Title: "Access is not allowed",
		Text: srv.node() + " does not let visitors in from where you are.",
		Hint: "If you should have access, try again from a network that is allowed, such as the tailnet.", Err: err}
	switch reason {
	case notIdentified:
		no.Status, no.Title = http.StatusServiceUnavailable, "You could not be identified"
		no.Text = srv.node() + " lets in only visitors that it knows, and could not find out who you are."
		no.Hint = "Try again in a few minutes."
		no.Header = http.Header{"Retry-After": {"5"}}
	case proxyFromStranger, proxyMissing:
		no.Header = http.Header{"Connection": {"close"}}
		no.Hint = "Try again. If it is yours, see accept_proxy in its configuration: it wants something else of the hop before now."
	}
	return no
}

// guard makes the guard of a rule of an http(s) listener, or nil.
func (srv *Server) guard(listener string, r *plan.Rule) vhost.Guard {
	var guards []vhost.Guard
	if r.Allow != nil {
		guards = append(guards, func(_ http.ResponseWriter, v *vhost.Visit) error { return srv.allowRequest(listener, v, r.Allow) })
	}
	if r.HTTP.Users != nil {
		guards = append(guards, srv.basicGuard(listener, r.HTTP.Users))
	}
	if r.HTTP.Auth != nil {
		guards = append(guards, srv.forwardGuard(listener, r.HTTP.Asked, r.HTTP.Auth))
	}
	if len(guards) == 0 {
		return nil
	}
	return func(w http.ResponseWriter, v *vhost.Visit) error {
		for _, g := range guards {
			if err := g(w, v); err != nil {
				return err
			}
		}
		return nil
	}
}

// basicGuard asks for a user and a password. The upstream gets the name, and not the password.
func (srv *Server) basicGuard(listener string, users *auth.Users) vhost.Guard {
	return func(_ http.ResponseWriter, v *vhost.Visit) error {
		user, password, sent := v.Request.BasicAuth()
		right := false
		if sent {
			var err error
			if right, err = users.Check(v.Request.Context(), limit.PrefixOf(visitorOf(v).Source()), user, password); err != nil {
				return srv.passwordError(listener, v, user, err)
			}
		}
		if right {
			v.User = user
			v.Drop = append(v.Drop, "Authorization")
			v.SetHeader("X-Forwarded-User", headerText(user))
			return nil
		}
		err := errNoPassword
		if sent {
			err = fmt.Errorf("%w for user %q", errWrongPassword, user)
			srv.requestRefused(listener, v, "wrong_password", err)
		} else {
			srv.metrics.Refused.WithLabelValues(listener, "no_password").Inc() // how each visit begins
		}
		return &vhost.Refusal{Status: http.StatusUnauthorized, Title: "Sign in",
			Text:   srv.node() + " asks for a user name and a password.",
			Header: http.Header{"Www-Authenticate": {`Basic realm="` + srv.node() + `", charset="UTF-8"`}}, Err: err}
	}
}

// passwordError is what a request gets whose password was not checked.
func (srv *Server) passwordError(listener string, v *vhost.Visit, user string, err error) error {
	busy, ok := errors.AsType[*auth.BusyError](err)
	if !ok {
		return err
	}
	srv.requestRefused(listener, v, "passwords_over_limit", fmt.Errorf("user %q: %w", user, err))
	no := &vhost.Refusal{Status: http.StatusServiceUnavailable, Title: "Too many people are signing in",
		Text: srv.node() + " can't check more passwords at the moment.", Hint: "Try again in a few minutes.",
		Header: http.Header{"Retry-After": {strconv.Itoa(int(math.Ceil(busy.RetryAfter.Seconds())))}}, Err: err}
	if busy.Source {
		no.Status, no.Title = http.StatusTooManyRequests, "Too many attempts to sign in"
		no.Text = srv.node() + " has received too many passwords from your address."
	}
	return no
}

var (
	errNoPassword    = errors.New("no user and password")
	errWrongPassword = errors.New("wrong password")
)

var errAuthLoop = errors.New("the address of forward_auth leads to a route that asks it: write that of the auth server itself, or give it a route without forward_auth")

// forwardGuard asks another server about each request.
func (srv *Server) forwardGuard(listener, address string, fw *auth.Forward) vhost.Guard {
	return func(w http.ResponseWriter, v *vhost.Visit) error {
		if fw.IsOwn(v.Request.Header) {
			err := fmt.Errorf("%w: %s", errAuthLoop, address)
			srv.requestRefused(listener, v, "auth_loop", err)
			return &vhost.Refusal{Status: http.StatusLoopDetected, Title: "The sign-in service does not work",
				Text: "It could not be found out whether you have access: " + srv.node() + " and the sign-in service ask each other.", Err: err}
		}
		v.Drop = append(v.Drop, fw.Copies()...)
		header := v.Request.Header.Clone()
		auth.RemoveHopByHop(header)
		v.Apply(header)
		// What was routed is asked about, in one spelling, whatever the hop before says that its own client
		// asked for.
		header["X-Forwarded-Host"] = []string{v.URI.HostPort()}
		res, err := fw.Ask(v.Request.Context(), v.Request.Method, v.URI.String(), header)
		if err != nil {
			if v.Request.Context().Err() != nil {
				return err
			}
			return srv.noAuthServer(listener, address, v, err)
		}
		defer res.Body.Close()
		if res.StatusCode >= 200 && res.StatusCode < 300 {
			letIn(v, fw, res.Header)
			return nil
		}
		// who is not signed in is sent to do so
		srv.metrics.Refused.WithLabelValues(listener, "forward_auth").Inc()
		passOn(w, res, v.Request.Method)
		return vhost.ErrAnswered
	}
}

// noAuthServer is what a request gets about which the server at address gave no usable answer.
func (srv *Server) noAuthServer(listener, address string, v *vhost.Visit, err error) error {
	err = fmt.Errorf("forward_auth %s: %w", address, err)
	srv.metrics.Refused.WithLabelValues(listener, "auth_server").Inc()
	srv.limited.Warn("auth_server "+address, "the forward_auth server gave no usable answer",
		"id", v.ID, "listener", listener, "address", address, "err", err)
	no := &vhost.Refusal{Status: http.StatusBadGateway, Title: "The sign-in service sent no valid answer",
		Text: srv.node() + " could not find out whether you have access.",
		Hint: "Try again in a few minutes.", Err: err}
	if errors.Is(err, auth.ErrNoAnswer) {
		no.Status, no.Title = http.StatusServiceUnavailable, "The sign-in service is not answering"
		no.Header = http.Header{"Retry-After": {"10"}}
	}
	return no
}

// letIn gives the request what the auth server says of who makes it.
func letIn(v *vhost.Visit, fw *auth.Forward, answer http.Header) {
	for name, values := range fw.Copied(answer) {
		v.SetHeader(name, "")
		v.Set[name] = values
	}
	if cookies := answer["Set-Cookie"]; cookies != nil {
		v.Answer = http.Header{"Set-Cookie": cookies} // a session that was refreshed
	}
	for _, name := range []string{"Remote-User", "X-Auth-Request-User", "X-Forwarded-User"} {
		if user := v.Set.Get(name); user != "" {
			v.User = user
			break
		}
	}
}

// passOn answers w with what the auth server has answered.
func passOn(w http.ResponseWriter, res *http.Response, method string) {
	for name, values := range res.Header {
		w.Header()[name] = values
	}
	w.WriteHeader(res.StatusCode)
	if method != http.MethodHead {
		if _, err := io.Copy(w, res.Body); err != nil {
			panic(http.ErrAbortHandler) // so that half an answer doesn't look like a whole one
		}
	}
}
