package vhost

import (
	"net/http"
	"time"

	"github.com/tailsplice/tailsplice/userspace/moment"
)

// Holder is what an Infoer may have beside. Holds is called once, before the first byte is read, with a
// function that says how many bytes the connection holds, in this process and in the sockets of its
// upstreams, for answers that the client takes nothing of, and since when it has taken nothing of one of
// them. Its own socket does not count: clients of HTTP/2 stop reading streams, and never the connection.
type Holder interface {
	Holds(held func() (bytes int64, since time.Time))
}

// begins notes that x's handler runs, and ends that it has returned.
func (c *conn) begins(x *exchange) {
	c.awaits.Store(0)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.exchanges[x] = struct{}{}
}

func (c *conn) ends(x *exchange) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.exchanges, x)
}

// held is what c holds, for Holder.
func (c *conn) held() (bytes int64, since time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	seen := map[*upstreamConn]bool{}
	for x := range c.exchanges {
		began := x.resp.writes.Load()
		if began == 0 {
			continue
		}
		bytes += copyBuffer // of a pool that has none to spare
		if at := began.Time(); since.IsZero() || at.Before(since) {
			since = at
		}
		if up := x.upConn.Load(); up != nil && !seen[up] { // HTTP/2 has one for many
			seen[up] = true
			bytes += queued(up.Conn)
		}
	}
	return bytes, since
}

// begins notes that the client must take something for w to go on.
func (w *response) begins() { w.writes.Store(moment.Now()) }

// FlushError is for http.ResponseController.
func (w *response) FlushError() error {
	w.begins()
	defer w.writes.Store(0)
	return http.NewResponseController(w.ResponseWriter).Flush()
}
