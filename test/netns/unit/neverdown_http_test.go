package unit

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// streamsTogether is how many streams a connection of HTTP/2 has. A source of many may have 16 in each.
const streamsTogether = 8

// certificate makes one for the daemon, and returns the configuration's files of it.
func certificate(t *testing.T, w *lab.World, m *machine) string {
	t.Helper()
	cert, key, err := w.CA.Issue(lab.Site)
	if err != nil {
		t.Fatal(err)
	}
	m.write(t, "etc/tailsplice/site.pem", string(cert))
	m.write(t, "etc/tailsplice/site.key", string(key))
	return "{ cert: /etc/tailsplice/site.pem, key: /etc/tailsplice/site.key }"
}

// answerAlike serves HTTP at a port, and answers with what comes, piece by piece: a WebSocket, or a request's body.
// It ends with the test, or by what it returns.
func answerAlike(t *testing.T, h *lab.Host, port string) (end func() error) {
	t.Helper()
	ln, err := h.Listen("tcp", net.JoinHostPort(h.IP4.String(), port))
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "" {
			if c, err := websocket.Accept(w, r, nil); err == nil {
				defer c.CloseNow()
				both := websocket.NetConn(r.Context(), c, websocket.MessageBinary)
				io.Copy(both, both)
			}
			return
		}
		control := http.NewResponseController(w)
		control.EnableFullDuplex()
		control.Flush() // whoever waits for an answer sends nothing until then
		b := make([]byte, 32<<10)
		for {
			n, err := r.Body.Read(b)
			if w.Write(b[:n]); err != nil {
				return
			}
			control.Flush()
		}
	})}
	s.Protocols.SetHTTP1(true)
	s.Protocols.SetUnencryptedHTTP2(true)
	t.Cleanup(func() { s.Close() })
	go s.Serve(ln)
	return s.Close
}

// requester makes requests of the daemon, as one client by as few connections as there may be.
type requester struct {
	http.Client
	url         string
	connections atomic.Int64 // that were made
	hasLost     atomic.Bool  // one of them was cut
}

func (n *neverDown) requester(w way) *requester {
	r := &requester{url: fmt.Sprintf("https://%s:%d/", n.host.IP4, w.port())}
	if w == webSocket {
		r.url = strings.Replace(r.url, "https:", "http:", 1)
	}
	n.requesters.Store(r, nil)
	protocols := new(http.Protocols)
	protocols.SetHTTP1(w != http2)
	protocols.SetHTTP2(w == http2)
	r.Transport = &http.Transport{
		Protocols:       protocols,
		TLSClientConfig: &tls.Config{RootCAs: n.world.CA.Pool, ServerName: lab.Site},
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			r.connections.Add(1)
			c, err := n.world.Client.Dial(ctx, "tcp4", address)
			if err != nil {
				return nil, &notConnected{err}
			}
			return &watched{c, r}, nil
		},
	}
	return r
}

// watched is a connection of a requester.
type watched struct {
	net.Conn
	by *requester
}

func (w *watched) Read(b []byte) (int, error)  { return w.look(w.Conn.Read(b)) }
func (w *watched) Write(b []byte) (int, error) { return w.look(w.Conn.Write(b)) }

func (w *watched) look(n int, err error) (int, error) {
	if err != nil && isCut(err) {
		w.by.hasLost.Store(true)
	}
	return n, err
}

// tell returns what a request ended with. net/http has words of its own for a connection that was cut.
func (r *requester) tell(err error) error {
	if err == nil || err == io.EOF || !r.hasLost.Load() || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("%w: %w", io.ErrUnexpectedEOF, err)
}

// post makes a request. The answer is one of those that answerAlike gives.
func (r *requester) post(ctx context.Context, body io.Reader) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.url, body)
	if err != nil {
		return nil, err
	}
	req.Host = lab.Site
	res, err := r.Do(req)
	if err != nil {
		return nil, r.tell(err)
	}
	if res.StatusCode != http.StatusOK {
		defer res.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(res.Body, 1000))
		return nil, fmt.Errorf("%s: %s", res.Status, text)
	}
	return res.Body, nil
}

// ask makes a request, and reads the answer.
func (r *requester) ask(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stuck)
	defer cancel()
	sent := make([]byte, 300)
	for i := range sent {
		sent[i] = byte(rand.Uint32())
	}
	body, err := r.post(ctx, bytes.NewReader(sent))
	if err != nil {
		return err
	}
	defer body.Close()
	got, err := io.ReadAll(body)
	if err = r.tell(err); err == nil && !bytes.Equal(got, sent) {
		err = errWrong
	}
	return err
}

// webSocket opens a WebSocket that lasts until ctx ends, if nothing else ends it.
func (r *requester) webSocket(ctx context.Context) (timed, error) {
	dialing, cancel := context.WithTimeout(ctx, stuck)
	defer cancel()
	c, _, err := websocket.Dial(dialing, r.url, &websocket.DialOptions{HTTPClient: &r.Client, Host: lab.Site})
	if err != nil {
		return timed{}, err
	}
	return timed{websocket.NetConn(ctx, c, websocket.MessageBinary)}, nil
}

// stream is a request whose body goes on, and so does its answer.
type stream struct {
	by   *requester
	up   *io.PipeWriter
	down io.ReadCloser
	stop context.CancelFunc
}

// stream opens a stream that lasts until ctx ends, if nothing else ends it.
func (r *requester) stream(ctx context.Context) (*stream, error) {
	ctx, stop := context.WithCancel(ctx)
	body, up := io.Pipe()
	defer time.AfterFunc(stuck, stop).Stop()
	down, err := r.post(ctx, body)
	if err != nil {
		stop()
		return nil, err
	}
	return &stream{r, up, down, stop}, nil
}

func (s *stream) Read(b []byte) (int, error) {
	defer time.AfterFunc(stuck, s.stop).Stop()
	n, err := s.down.Read(b)
	return n, s.by.tell(err)
}

func (s *stream) Write(b []byte) (int, error) {
	defer time.AfterFunc(stuck, s.stop).Stop()
	n, err := s.up.Write(b)
	return n, s.by.tell(err)
}

// Close ends the request, and waits for the end of the answer.
func (s *stream) Close() error {
	defer s.stop()
	s.up.Close()
	n, err := io.Copy(io.Discard, s)
	if n > 0 && err == nil {
		err = errWrong
	}
	return err
}

// share has others make requests by the connections of streams.
func (n *neverDown) share() {
	var all []*requester
	for _, l := range n.all {
		if l.way == http2 {
			all = append(all, l.by)
		}
	}
	n.shared.Store(&all)
}

// newcomer makes the i-th connection, or has another one make one request more.
func (n *neverDown) newcomer(ctx context.Context, i int) error {
	switch i % 20 {
	case 0:
		all := *n.shared.Load()
		return all[rand.IntN(len(all))].ask(ctx)
	case 1:
		r := n.requester(webSocket + way(i/20%3))
		defer r.CloseIdleConnections()
		return r.ask(ctx)
	}
	return n.exchange(ctx, 9100+i%2)
}

// retire ends some requests: a quarter, or all that an older process has.
func (n *neverDown) retire(t *testing.T) {
	t.Helper()
	var older []string
	for _, l := range n.all {
		if l.isRequest() && !l.hasEnded() && l.in != n.pid {
			older = append(older, l.in)
		}
	}
	if len(older) > 0 && n.random.IntN(2) == 0 {
		in := older[n.random.IntN(len(older))]
		n.end(t, func(l *live) bool { return l.in == in })
		return
	}
	n.end(t, func(l *live) bool { return l.isRequest() && n.random.IntN(4) == 0 })
}

// wasCut reports whether a flow or a request was ended with the process that had it.
func wasCut(err error) bool { return isCut(err) && !errors.Is(err, errWrong) }
