package vhost

import (
	"context"
	"errors"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/tailsplice/tailsplice/userspace/moment"
)

// How long a connection may still begin a request once Shutdown is called. net/http's own Shutdown answers
// none of HTTP/1 whose head has not come whole by then, and closes idle connections at once: a client that
// makes requests all the time has one on its way then, and can't know whether it may repeat it.
const (
	// firstCall is for a connection on which none has come, from its begin: as long as net/http waits for it.
	firstCall = 5 * time.Second
	// lastCall is for one of HTTP/1 that was kept, from its last answer.
	lastCall = time.Second
)

// AnswerLast has each answer from now on say that it is the last of its connection. Connections are taken
// until Shutdown.
func (s *Server) AnswerLast() { s.isEnding.Store(true) }

// Shutdown takes no more connections, closes idle ones, and waits for the others, upgraded ones too, to end.
// Requests that come nevertheless are answered, with word that they are the last. When ctx ends first, it
// closes what is left and returns ctx's error.
func (s *Server) Shutdown(ctx context.Context) error {
	s.refuseMore()
	s.serveLast(ctx)
	var errs [crowds]error
	var all sync.WaitGroup
	for c := range s.http {
		all.Go(func() { errs[c] = s.http[c].Shutdown(ctx) })
	}
	all.Wait()
	err := errors.Join(errs[:]...)
	if err == nil {
		select {
		case <-s.gone.Done():
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	s.Close()
	return err
}

// serveLast has each connection end, and waits until none awaits a request any more, but for those of HTTP/2,
// which are told to go.
func (s *Server) serveLast(ctx context.Context) {
	for wait := time.Millisecond; s.isAwaiting() && ctx.Err() == nil; wait = min(2*wait, 50*time.Millisecond) {
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

func (s *Server) isAwaiting() (is bool) {
	s.mu.Lock()
	all := slices.Collect(maps.Keys(s.conns))
	s.mu.Unlock()
	for _, c := range all {
		is = c.isAwaiting() || is
	}
	return is
}

// isAwaiting reports whether net/http's Shutdown has to wait for c. It has c end if that is due, whoever else
// is waited for.
func (c *conn) isAwaiting() bool {
	if c.hasPromised.Load() { // is cleared after awaits is set
		return true
	}
	awaits := c.awaits.Load()
	switch {
	case c.isHTTP2.Load():
		if awaits != 0 && awaits.Since() < c.server.firstCall {
			return true
		}
		if !c.isTold.Swap(true) {
			c.call()
		}
		return false
	case awaits == 0:
		return false
	case !c.isUp.Load(): // its handshake has a time of its own
	case c.isIdle():
		c.call()
	}
	return true // until it is gone
}

// call has who reads from c look whether it is to end. Nobody else can: what comes meanwhile is for the
// reader.
func (c *conn) call() {
	c.readMu.Lock()
	defer c.readMu.Unlock()
	c.isCalled = true
	c.Conn.SetReadDeadline(time.Unix(1, 0))
}

// wasCalled reports whether a read that gave nothing but err was ended by call. The next one will not be.
func (c *conn) wasCalled(err error) bool {
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return false
	}
	c.readMu.Lock()
	defer c.readMu.Unlock()
	if !c.isCalled {
		return false
	}
	c.isCalled = false
	c.Conn.SetReadDeadline(c.readBy)
	return true
}

// SetReadDeadline leaves alone who was called until that is heard.
func (c *conn) SetReadDeadline(t time.Time) error {
	c.readMu.Lock()
	defer c.readMu.Unlock()
	c.readBy = t
	if c.isCalled {
		return nil
	}
	return c.Conn.SetReadDeadline(t)
}

// readFrom reads from r, which is c's socket or TLS on it, for net/http. When that is called it reads on, or
// reads that the client has ended the connection.
func (c *conn) readFrom(r io.Reader, b []byte) (n int, err error) {
	for {
		n, err = r.Read(b)
		switch {
		case n > 0 || c.secure != nil && r != c.secure.Conn || !c.wasCalled(err):
			return n, err
		case c.isIdle():
			return 0, io.EOF
		}
	}
}

// isIdle reports whether a connection of HTTP/1 has had its time to begin a request, and has begun none.
func (c *conn) isIdle() bool {
	isQueued := queued(c.Conn) > 0 // before heard is: what was read meanwhile is there
	heard, awaits := c.heard.Load(), c.awaits.Load()
	switch {
	case awaits == 0 || isQueued:
		return false
	case heard != 0:
		return heard.Since() >= c.server.opts.HeaderTimeout
	case c.hasHTTP1.Load():
		return awaits.Since() >= c.server.lastCall
	}
	return awaits.Since() >= c.server.firstCall
}

// await notes that the head of a request is awaited from now on.
func (c *conn) await() {
	c.heard.Store(0)
	c.awaits.Store(moment.Now())
	c.hasPromised.Store(false)
}

// connState is called by net/http: of HTTP/2 first when it knows the connection, and will tell it to go.
func connState(c net.Conn, state http.ConnState) {
	if state != http.StateIdle {
		return
	}
	if below := connOf(c); below.hasHTTP1.Load() {
		below.await()
	} else {
		below.isHTTP2.Store(true)
	}
}

// isLast reports whether x's answer, which is about to be written, is the last of its connection.
//
// As with Shutdown: it looks for promises after it has become known that no more is to be promised, and here
// that is looked at after the promise.
func (s *Server) isLast(x *exchange) bool {
	if x.resp.status == http.StatusSwitchingProtocols || x.req.ProtoMajor == 1 && x.req.Close {
		return false
	}
	x.conn.hasPromised.Store(x.req.ProtoMajor == 1)
	if !s.isEnding.Load() {
		return false
	}
	x.conn.hasPromised.Store(false)
	return true
}
