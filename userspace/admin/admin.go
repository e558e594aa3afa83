// Package admin is how people and scripts talk to a running daemon: HTTP with
// JSON over a unix socket, and the client for it that the command line uses.
// Metrics have a TCP address of their own.
//
//	GET  /v1/status     what the daemon is and does
//	GET  /v1/flows      the live flows; 400 with the reason if the query makes no sense
//	GET  /v1/top        what the live flows move, a line of JSON each interval; 400 as for flows
//	GET  /v1/trace      what becomes of a name; 400 as for flows
//	GET  /v1/log/level  the level of the daemon's log
//	POST /v1/reload     reads the configuration again, or is upgrade, if there is another program by now
//	                    by now; 422 with the reason if it can't be used
//	POST /v1/upgrade    has another program take over; 422 with the reason if it can't
//	POST /v1/CHANGE     one of Daemon.Changes; 422 as for reload
//
// Root and the user of the daemon may do all of that. The group of the socket may look: a POST is answered
// with 403. Whoever else can open the socket, because its mode was changed, is as the group.
//
// A process that another one has taken over from answers 421 to a POST: that one answers at the socket.
//
//	admin.go       the socket, its server and its client
//	change.go      who may change what the daemon does, and that it is logged
//	peer_linux.go  who has connected, and who can
//	health.go      /healthz and /readyz
package admin

import (
	"bufio"
	"cmp"
	"container/list"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Daemon is what the socket shows and does. Status, Flows, Trace and LogLevel return values
// that encoding/json can write; Top sends them, until ctx ends or send fails. The notes of Reload are for the
// person who asked for it: what is odd about a configuration that is now in force.
type Daemon struct {
	Status   func() any
	Flows    func(query url.Values) (any, error)
	Top      func(ctx context.Context, query url.Values, send func(any) error) error
	Trace    func(ctx context.Context, query url.Values) (any, error)
	LogLevel func() any
	// Reload and Upgrade take as long as they take, or until ctx ends. The notes are for who asked.
	Reload  func(ctx context.Context) (notes []string, err error)
	Upgrade func(ctx context.Context, query url.Values) (notes []string, err error)

	Changes map[string]Change // by their path below /v1/, such as "drain"
	Log     *slog.Logger      // hears of all changes, Reload too, and who asked for them
}

// ErrMoved is that of a process that another one has taken over from.
var ErrMoved = errors.New("another process has taken over from this one: ask again")

// Handler serves d.
func (d Daemon) Handler() http.Handler {
	mux := http.NewServeMux()
	show := func(get func(ctx context.Context, query url.Values) (any, error)) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			answer, err := get(r.Context(), r.URL.Query())
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			answerJSON(w, answer)
		}
	}
	mux.HandleFunc("GET /v1/status", show(func(context.Context, url.Values) (any, error) { return d.Status(), nil }))
	mux.HandleFunc("GET /v1/flows", show(func(_ context.Context, query url.Values) (any, error) { return d.Flows(query) }))
	mux.HandleFunc("GET /v1/trace", show(func(ctx context.Context, query url.Values) (any, error) { return d.Trace(ctx, query) }))
	mux.HandleFunc("GET /v1/log/level", show(func(context.Context, url.Values) (any, error) { return d.LogLevel(), nil }))
	mux.HandleFunc("GET /v1/top", d.top)
	long := func(
		do func(ctx context.Context, query url.Values) (notes []string, err error)) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			rc := http.NewResponseController(w)
			rc.SetReadDeadline(time.Time{}) // it takes a while
			rc.SetWriteDeadline(time.Time{})
			change(d.Log, func(query url.Values, _ Peer) (any, error) { return do(r.Context(), query) },
				answerLines)(w, r)
		}
	}
	reload := func(ctx context.Context, _ url.Values) ([]string, error) { return d.Reload(ctx) }
	mux.HandleFunc("POST /v1/reload", long(reload))
	mux.HandleFunc("POST /v1/upgrade", long(d.Upgrade))
	for name, do := range d.Changes {
		mux.HandleFunc("POST /v1/"+name, change(d.Log, do, answerJSON))
	}
	return mux
}

// top sends lines for as long as the client takes each in time.
func (d Daemon) top(w http.ResponseWriter, r *http.Request) {
	rc := http.NewResponseController(w)
	rc.SetReadDeadline(time.Time{}) // which would end the request's context
	w.Header().Set("Content-Type", "application/jsonl")
	lines := json.NewEncoder(w)
	begun := false
	err := d.Top(r.Context(), r.URL.Query(), func(v any) error {
		begun = true
		rc.SetWriteDeadline(time.Now().Add(writeTimeout))
		return errors.Join(lines.Encode(v), rc.Flush())
	})
	if err != nil && !begun {
		http.Error(w, err.Error(), http.StatusBadRequest)
	}
}

// Listen binds the control socket at path, which its owner and its group can open. A socket that a dead
// daemon left is replaced; the socket of a live one is an error, and so is a file of another kind. The error
// wraps [fs.ErrPermission] where the process may not make the socket there.
func Listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("control socket %s: %w", path, err)
	}
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() != fs.ModeSocket {
		return nil, fmt.Errorf("control socket %s: a file that is not a socket is in its place: move it away, or choose another control.socket", path)
	}
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		return nil, fmt.Errorf("control socket %s: another daemon answers there: stop it, or give this one its own control.socket", path)
	} else if errors.Is(err, syscall.ECONNREFUSED) {
		os.Remove(path)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("control socket %s: somebody may listen there: %w", path, err)
	}
	// The socket must never be open to others, not even for a moment: it is
	// made in a directory of its own and then moved to its place.
	dir, err := os.MkdirTemp(filepath.Dir(path), ".control-")
	if err != nil {
		return nil, fmt.Errorf("control socket %s: %w", path, err)
	}
	defer os.RemoveAll(dir)
	made := filepath.Join(dir, "s")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: made, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("control socket %s: %w", path, err)
	}
	ln.SetUnlinkOnClose(false)
	err = errors.Join(os.Chmod(made, socketMode), os.Rename(made, path))
	if err != nil {
		ln.Close()
		return nil, fmt.Errorf("control socket %s: %w", path, err)
	}
	return newSocket(ln, path), nil
}

// Adopt makes a control socket of one that another process has bound at path, by [Listen]. It closes ln
// with an error.
func Adopt(ln net.Listener, path string) (net.Listener, error) {
	u, ok := ln.(*net.UnixListener)
	if !ok {
		ln.Close()
		return nil, fmt.Errorf("control socket %s: what was handed over is another kind of socket", path)
	}
	u.SetUnlinkOnClose(false)
	return newSocket(u, path), nil
}

// socket removes its file when it is closed.
type socket struct {
	*net.UnixListener
	path string
	file fs.FileInfo // nil: it was gone
}

func newSocket(ln *net.UnixListener, path string) *socket {
	file, _ := os.Lstat(path)
	return &socket{ln, path, file}
}

// IsInPlace reports whether clients find the socket: its file may have been removed, or another one be there.
func (s *socket) IsInPlace() bool {
	now, err := os.Lstat(s.path)
	if err != nil || s.file == nil {
		return false
	}
	return os.SameFile(now, s.file) && now.ModTime().Equal(s.file.ModTime()) // an inode may be used again
}

// Leave closes the socket, which is another process's now, and leaves its file.
func (s *socket) Leave() error { return s.UnixListener.Close() }

func (s *socket) Close() error {
	err := s.UnixListener.Close()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	if !s.IsInPlace() { // what is there by now is another's
		return err
	}
	return errors.Join(err, os.Remove(s.path))
}

const (
	readTimeout = 5 * time.Second // for a request
	// writeTimeout is for making an answer and for its client to read it. A
	// reload may wait for tailscaled and for access logs that are closed.
	writeTimeout  = time.Minute
	idleTimeout   = 2 * time.Minute // longer than a scraper's interval
	healthTimeout = 5 * time.Second // for a request to /healthz or /readyz, and again for the answer
)

// Serve answers on ln until ctx ends, then closes it. Clients that don't read
// or say nothing are left after a while. If somebody else closes ln, what was
// asked by then is answered first.
func Serve(ctx context.Context, ln net.Listener, h http.Handler, log *slog.Logger) {
	srv := &http.Server{Handler: h, ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout, ConnContext: withPeer}
	runServer(ctx, ln, srv, log)
}

// ServeHealth is [Serve] for clients that may be strangers: a connection is for one request, and the open
// connections of one client keep no other client from being answered.
func ServeHealth(ctx context.Context, ln net.Listener, h Health, log *slog.Logger) {
	srv := &http.Server{Handler: h.Handler(), ReadTimeout: healthTimeout, WriteTimeout: healthTimeout}
	srv.SetKeepAlivesEnabled(false)
	runServer(ctx, LimitConnections(ln), srv, log)
}

func runServer(ctx context.Context, ln net.Listener, srv *http.Server, log *slog.Logger) {
	srv.ErrorLog = slog.NewLogLogger(log.Handler(), slog.LevelDebug)
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	var open sync.WaitGroup
	srv.ConnState = func(_ net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			open.Add(1)
		case http.StateClosed, http.StateHijacked:
			open.Done()
		}
	}
	err := srv.Serve(ln)
	if errors.Is(err, net.ErrClosed) {
		// Who has connected is answered. srv.Shutdown would close those whose request is yet to be read.
		srv.SetKeepAlivesEnabled(false)
		answered := make(chan struct{})
		go func() {
			open.Wait()
			close(answered)
		}()
		select {
		case <-answered:
		case <-ctx.Done():
		}
	} else if !errors.Is(err, http.ErrServerClosed) {
		log.Error("a server of the control section ended", "address", ln.Addr().String(), "err", err)
	}
}

// maxConnections is how many connections may be open to the metrics, and to /healthz and /readyz.
const maxConnections = 128

// bounded is a listener with room for so many connections. One more takes the place of the oldest, which is
// closed: a client that asks has its answer within milliseconds, so the oldest does not ask.
type bounded struct {
	net.Listener
	room int

	mu sync.Mutex
	// +checklocks:mu
	open list.List // of *boundedConn, the oldest first
}

// LimitConnections bounds the connections of ln such that a new one always has a place.
func LimitConnections(ln net.Listener) net.Listener {
	return &bounded{Listener: ln, room: maxConnections}
}

func (b *bounded) Accept() (net.Conn, error) {
	accepted, err := b.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &boundedConn{Conn: accepted, of: b}
	b.mu.Lock()
	var oldest *boundedConn
	if b.open.Len() >= b.room {
		oldest = b.open.Remove(b.open.Front()).(*boundedConn)
		oldest.place = nil // +checklocksignore: oldest.of is b
	}
	c.place = b.open.PushBack(c)
	b.mu.Unlock()
	if oldest != nil {
		oldest.Close()
	}
	return c, nil
}

type boundedConn struct {
	net.Conn
	of *bounded
	// +checklocks:of.mu
	place *list.Element // nil once another connection has taken it
}

func (c *boundedConn) Close() error {
	c.of.mu.Lock()
	if c.place != nil {
		c.of.open.Remove(c.place)
		c.place = nil
	}
	c.of.mu.Unlock()
	return c.Conn.Close()
}

// Client talks to the daemon at a control socket.
type Client struct {
	Socket string
}

// open asks the daemon. The caller closes the answer's body.
func (c Client) open(ctx context.Context, method, path string) (io.ReadCloser, error) {
	t := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", c.Socket)
	}}
	req, err := http.NewRequestWithContext(ctx, method, "http://tailsplice"+path, nil)
	if err != nil {
		return nil, err
	}
	res, err := t.RoundTrip(req)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("no daemon answers at %s: is `tailsplice run` up? --control names another socket", c.Socket)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%s: permission denied: use root, the account that runs the daemon, or one in the group of the socket, which may look", c.Socket)
	case errors.Is(err, context.DeadlineExceeded):
		return nil, fmt.Errorf("the daemon at %s does not answer: its log may say why", c.Socket)
	case err != nil:
		return nil, fmt.Errorf("ask the daemon at %s: %w", c.Socket, err)
	}
	if res.StatusCode == http.StatusOK {
		return res.Body, nil
	}
	body, err := readAll(res.Body)
	if res.StatusCode == http.StatusMisdirectedRequest {
		return nil, ErrMoved
	}
	if err == nil {
		err = errors.New(strings.TrimSpace(string(body)))
	}
	return nil, err
}

func readAll(body io.ReadCloser) ([]byte, error) {
	defer body.Close()
	b, err := io.ReadAll(body)
	if err != nil {
		err = fmt.Errorf("read the daemon's answer: %w", err)
	}
	return b, err
}

func (c Client) do(ctx context.Context, method, path string) ([]byte, error) {
	body, err := c.open(ctx, method, path)
	if err != nil {
		return nil, err
	}
	return readAll(body)
}

// Lines gives each line of what a noun answers, such as "top?interval=1s", to line, until that returns an
// error or ctx ends, whose error it returns. There is no end else: the daemon's is an error.
func (c Client) Lines(ctx context.Context, noun string, line func([]byte) error) error {
	body, err := c.open(ctx, http.MethodGet, "/v1/"+noun)
	if err != nil {
		return err
	}
	defer body.Close()
	for r := bufio.NewReader(body); ; {
		b, err := r.ReadBytes('\n')
		if err == nil {
			err = line(b)
		} else if ctx.Err() == nil {
			err = fmt.Errorf("the daemon at %s has ended", c.Socket)
		}
		if err := cmp.Or(ctx.Err(), err); err != nil {
			return err
		}
	}
}

// Get reads a noun ("status", "flows", "trace?host=example.org") as JSON into v.
func (c Client) Get(ctx context.Context, noun string, v any) error {
	body, err := c.do(ctx, http.MethodGet, "/v1/"+noun)
	if err != nil {
		return err
	}
	return json.Unmarshal(body, v)
}

// Reload asks the daemon to read its configuration again, or to upgrade where its program was replaced. notes
// is what there is to say about that, one a line; the error is the daemon's reason for staying as it is.
func (c Client) Reload(ctx context.Context) (notes string, err error) {
	return c.change(ctx, "/v1/reload")
}

// Upgrade has another program take over from the daemon: notes is what has become of it, the error why
// nothing has.
func (c Client) Upgrade(ctx context.Context, query url.Values) (notes string, err error) {
	return c.change(ctx, "/v1/upgrade?"+query.Encode())
}

// change has the daemon do something, or the process that has taken over from it meanwhile.
func (c Client) change(ctx context.Context, path string) (notes string, err error) {
	for {
		body, err := c.do(ctx, http.MethodPost, path)
		if !errors.Is(err, ErrMoved) {
			return string(body), err
		}
		select {
		case <-ctx.Done():
			return "", err
		case <-time.After(10 * time.Millisecond):
		}
	}
}
