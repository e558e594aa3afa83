package vhost

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/tailsplice/tailsplice/userspace/moment"
)

// response is a request's http.ResponseWriter: it remembers what was answered.
type response struct {
	http.ResponseWriter
	status   int
	bytes    int64
	writes   moment.Var // since when the client is to take something; never: nothing is written
	traffic  Traffic    // of the route
	hijacked *upgraded
	before   func(http.Header) // called once, with the final answer's header when that is about to be written
	isPlain  bool              // the client speaks HTTP/1.0
	isLast   bool              // the connection is closed after this answer
	protocol []string          // the header Upgrade of the upstream's 101
}

// Header is the answer's. ReverseProxy asks again for a 101's, with the upstream's in it, to write that.
func (w *response) Header() http.Header {
	h := w.ResponseWriter.Header()
	if w.hijacked != nil && h["Upgrade"] != nil {
		h["Upgrade"] = w.protocol
		spellWebSocket(h)
	}
	return h
}

// Unwrap lets http.ResponseController flush.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *response) WriteHeader(status int) {
	if status < 200 && w.isPlain {
		return // HTTP/1.0 has no answer before the answer
	}
	if status >= 200 && w.status == 0 {
		w.status = status
		h := w.Header()
		w.before(h)
		spellWebSocket(h)
		if w.isLast {
			h["Connection"] = []string{"close"}
		}
		// An answer without a type stays one: net/http would guess.
		if h["Content-Type"] == nil {
			h["Content-Type"] = nil
		}
	}
	w.ResponseWriter.WriteHeader(status)
}

// cutOff ends x's answer in the middle. HTTP/1.0 without a length needs a reset, or it would look whole.
func (x *exchange) cutOff() {
	w := x.resp
	if w.status < 200 || w.status == statusClientLeft || x.req.Context().Err() != nil {
		return
	}
	rc := http.NewResponseController(w.ResponseWriter)
	if x.req.ProtoMajor >= 2 {
		// Else a stream whose window is empty keeps its handler.
		_ = rc.SetWriteDeadline(time.Now().Add(refusalWait))
	}
	_ = rc.Flush()
	if w.isPlain && w.Header()["Content-Length"] == nil {
		x.conn.reset()
	}
}

func (w *response) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	w.begins()
	n, err := w.ResponseWriter.Write(p)
	w.writes.Store(0)
	w.bytes += int64(n)
	add(w.traffic.Down, n)
	return n, err
}

// Hijack hands the connection over to an upgraded protocol. ReverseProxy does not read from the buffer that
// comes with it, which has what the client sent early: the connection that it gets gives that first.
func (w *response) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	w.status = http.StatusSwitchingProtocols
	w.before(w.Header()) // to which ReverseProxy adds the upstream's
	w.hijacked = &upgraded{Conn: c, early: rw.Reader, traffic: w.traffic}
	return w.hijacked, rw, nil
}

// upgraded is a downstream connection that speaks another protocol now.
type upgraded struct {
	net.Conn
	early   *bufio.Reader // nil once it is empty; the reader's only
	in, out atomic.Int64
	traffic Traffic
}

func (u *upgraded) Read(p []byte) (int, error) {
	from := io.Reader(u.Conn)
	if u.early != nil && u.early.Buffered() > 0 {
		from, p = u.early, p[:min(len(p), u.early.Buffered())]
	} else {
		u.early = nil
	}
	n, err := from.Read(p)
	u.in.Add(int64(n))
	add(u.traffic.Up, n)
	return n, err
}

func (u *upgraded) Write(p []byte) (int, error) {
	n, err := u.Conn.Write(p)
	u.out.Add(int64(n))
	add(u.traffic.Down, n)
	return n, err
}

// CloseWrite passes a half-close on.
func (u *upgraded) CloseWrite() error { return closeWrite(u.Conn) }
