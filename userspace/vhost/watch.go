package vhost

import (
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// Watch is over pooled HTTP1 connections whose other end may be asleep, as only shows when something is sent.
type Watch struct {
	// Soon is how long the other end may acknowledge nothing of a request which may be repeated, before that
	// gets a connection of its own. Late is for all others: they fail then.
	Soon, Late time.Duration
	// Unheard says whether a connection of Dial's waits for an acknowledgement, and heard nothing for d.
	Unheard func(c net.Conn, d time.Duration) bool
}

var errUnheard = Fail(ReasonTimeout, errors.New("the other end of the connection acknowledges nothing"))

// watcher is a Watch over one request's connection until the answer begins.
type watcher struct {
	conn  *upstreamConn
	watch *Watch
	limit time.Duration
	pool  *http.Transport

	mu sync.Mutex
	// +checklocks:mu
	timer *time.Timer
	// +checklocks:mu
	isOver bool
}

// watch begins to watch x's connection, which was used before.
func (x *exchange) watch(c *upstreamConn) {
	x.unwatch()
	w := &watcher{conn: c, watch: x.up.Watch, limit: x.up.Watch.Late, pool: x.conn.server.pool(x.up, HTTP1)}
	if repeatable(x.req.Method) && x.body == nil {
		w.limit = w.watch.Soon
	}
	w.mu.Lock() // look may be quicker
	w.timer = time.AfterFunc(w.limit, w.look)
	w.mu.Unlock()
	x.watcher = w
}

// unwatch ends the watch over x's connection.
func (x *exchange) unwatch() {
	if w := x.watcher; w != nil {
		w.mu.Lock()
		w.isOver = true
		w.timer.Stop()
		w.mu.Unlock()
		x.watcher = nil
	}
}

func (w *watcher) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.isOver:
	case w.watch.Unheard(w.conn.Conn, w.limit):
		w.isOver = true
		w.pool.CloseIdleConnections() // or each of them would be tried, one after the other
		w.conn.giveUp()
	default:
		w.timer.Reset(w.limit / 4)
	}
}

// giveUp resets the connection: nothing that is under way arrives later, and its reader learns why.
func (c *upstreamConn) giveUp() {
	c.isUnheard.Store(true)
	tcpsock.ResetConn(c.Conn)
}

func (c *upstreamConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	switch {
	case err == nil:
	case c.isUnheard.Load():
		err = errUnheard
	case err == io.EOF && !c.isShut.Load():
		// A write may be told of a reset in the place of an end, perhaps just now: what it hears says whether
		// there was an end before. TCP has given up the connection, which we have not ended: it hears soon.
		isClosed := false
		tcpsock.Control(c.Conn, func(fd int) { isClosed = tcpsock.IsClosed(fd) })
		if !c.isDeaf.Load() && isClosed {
			c.writing.Lock()
			c.writing.Unlock() //lint:ignore SA2001 it is the wait that counts
		}
		if c.isCut.Load() {
			err = syscall.ECONNRESET
		}
	}
	return n, err
}
