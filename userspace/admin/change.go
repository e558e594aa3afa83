package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

// Peer is the process that has connected to the control socket, as the kernel knows it. It takes the place of
// the connection's remote address, which a unix socket has none of.
type Peer struct {
	UID int
	PID int // 0: it is in another PID namespace, or this system does not say it
}

// Network is "unix".
func (p Peer) Network() string { return "unix" }

func (p Peer) String() string { return fmt.Sprintf("uid %d, pid %d", p.UID, p.PID) }

// mayChange says whether p may do more than look: it is root, or has the user of the daemon.
func (p Peer) mayChange() bool { return p.UID == 0 || p.UID == os.Geteuid() }

// A peerConn is a connection whose remote address is its [Peer].
type peerConn struct {
	*net.UnixConn
	peer Peer
}

func (c peerConn) RemoteAddr() net.Addr { return c.peer }

// Accept returns connections of known peers only.
func (s *socket) Accept() (net.Conn, error) {
	for {
		c, err := s.AcceptUnix()
		if err != nil {
			return nil, err
		}
		if peer, err := peerOf(c); err == nil {
			return peerConn{c, peer}, nil
		}
		c.Close()
	}
}

type peerKey struct{}

// withPeer makes c's peer known to its requests.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	if p, ok := c.RemoteAddr().(Peer); ok {
		return context.WithValue(ctx, peerKey{}, p)
	}
	return ctx
}

// A Change is done for who asks, in answer to a query. The answer is one that encoding/json can write. An
// error says why nothing was changed, and what to do.
type Change func(query url.Values, who Peer) (answer any, err error)

// change serves a change to those who may ask for it, and logs it with who they are. answer writes what the
// change answers.
func change(log *slog.Logger, do Change, answer func(w http.ResponseWriter, v any)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		name := strings.TrimPrefix(r.URL.Path, "/v1/")
		who, known := r.Context().Value(peerKey{}).(Peer)
		if !known || !who.mayChange() {
			say(log, slog.LevelWarn, "a change was refused at the control socket: this user may only look", name, who, nil)
			http.Error(w, fmt.Sprintf("user %d may look, and change nothing: use root, or the account that runs the daemon (user %d)",
				who.UID, os.Geteuid()), http.StatusForbidden)
			return
		}
		query, err := url.ParseQuery(r.URL.RawQuery)
		var v any
		if err == nil {
			v, err = do(query, who)
		}
		if errors.Is(err, ErrMoved) {
			http.Error(w, err.Error(), http.StatusMisdirectedRequest)
			return
		}
		asked := strings.TrimSuffix(name+" "+query.Encode(), " ")
		if err != nil {
			say(log, slog.LevelWarn, "a change was asked for at the control socket, and failed", asked, who, err)
			http.Error(w, err.Error(), http.StatusUnprocessableEntity)
			return
		}
		say(log, slog.LevelInfo, "a change was made at the control socket", asked, who, nil)
		answer(w, v)
	}
}

// say writes a line whatever the log's level is: what was done to a daemon must be found later.
func say(log *slog.Logger, level slog.Level, text, change string, who Peer, err error) {
	r := slog.NewRecord(time.Now(), level, text, 0)
	r.AddAttrs(slog.String("change", change), slog.Int("uid", who.UID), slog.Int("pid", who.PID))
	if err != nil {
		r.AddAttrs(slog.Any("err", err))
	}
	_ = log.Handler().Handle(context.Background(), r)
}

func answerJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v)
}

// answerLines writes a []string, one a line.
func answerLines(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	for _, line := range v.([]string) {
		fmt.Fprintln(w, line)
	}
}

// Change asks the daemon for one of its changes, such as "drain?listener=web", and reads the answer into v,
// which may be nil. The error is the daemon's reason for not doing it.
func (c Client) Change(ctx context.Context, what string, v any) error {
	body, err := c.change(ctx, "/v1/"+what)
	if err != nil || v == nil {
		return err
	}
	if err := json.Unmarshal([]byte(body), v); err != nil {
		return errors.New("the daemon's answer makes no sense: it may be of another version")
	}
	return nil
}
