package relaytest

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"
)

// randomSize prefers small ones, and never goes beyond most.
func randomSize(most int64) int64 {
	return rand.Int64N(1 + rand.Int64N(most+1))
}

func randomSizes(t *testing.T, p Path, s Size) {
	for range s.Random {
		client, server := p.Dial(t)
		up, down := randomSize(4<<20), randomSize(4<<20)
		if err := Exchange(client, server, up, down); err != nil {
			t.Fatalf("%d bytes up, %d down: %v", up, down, err)
		}
	}
}

func bigBothWays(t *testing.T, p Path, s Size) {
	client, server := p.Dial(t)
	must(t, Exchange(client, server, s.Big, s.Big))
}

func shortFlows(t *testing.T, p Path, s Size) {
	for i := range s.Short {
		client, server := p.Dial(t)
		if err := Exchange(client, server, randomSize(4<<10), randomSize(16<<10)); err != nil {
			t.Fatalf("flow %d: %v", i, err)
		}
	}
}

func concurrentFlows(t *testing.T, p Path, s Size) {
	var wg sync.WaitGroup
	for range s.Concurrent {
		client, server := p.Dial(t)
		wg.Go(func() {
			up, down := randomSize(s.Flow), randomSize(s.Flow)
			if err := Exchange(client, server, up, down); err != nil {
				t.Errorf("%d bytes up, %d down: %v", up, down, err)
			}
		})
	}
	wg.Wait()
}

// echo sends back what comes, until the end of the stream.
func echo(c net.Conn) error {
	buf := make([]byte, 64<<10)
	for {
		c.SetDeadline(time.Now().Add(patience))
		n, err := c.Read(buf)
		if n > 0 {
			if _, err := c.Write(buf[:n]); err != nil {
				return fmt.Errorf("echo: %w", err)
			}
		}
		if err != nil {
			return closeWrite(c)
		}
	}
}

func requestResponse(t *testing.T, p Path, s Size) {
	client, server := p.Dial(t)
	defer client.Close()
	defer server.Close()
	done := make(chan error, 1)
	go func() { done <- echo(server) }()
	out := newStream()
	in := *out
	for i := range s.Rounds {
		n := []int64{1, 64, 200, 1400, 16 << 10, 33 << 10}[i%6]
		must(t, out.send(client, n))
		must(t, in.receive(client, n))
	}
	must(t, closeWrite(client))
	must(t, wantEOF(client))
	must(t, <-done)
}

// PingPong sends messages of up to most bytes back and forth, some of them crossing, until enough. It gives
// the bytes that went each way.
func PingPong(client, server net.Conn, most int64, enough func() bool) (up, down int64, err error) {
	toServer, toClient := newStream(), newStream()
	atServer, atClient := *toServer, *toClient
	for i := int64(0); err == nil && !enough(); i++ {
		n, m := 1+i*7919%most, 1+i*104729%most
		up, down = up+n, down+m
		ask := func() error { return toServer.send(client, n) }
		hear := func() error { return atServer.receive(server, n) }
		answer := func() error { return toClient.send(server, m) }
		learn := func() error { return atClient.receive(client, m) }
		steps := []func() error{ask, hear, answer, learn}
		if i%5 == 4 {
			steps = []func() error{answer, ask, hear, learn}
		}
		for _, step := range steps {
			if err = step(); err != nil {
				break
			}
		}
	}
	return up, down, err
}

// bulkAndQuiet changes between bursts, small messages and rests, both ways at once: whatever a datapath
// does differently for bulk, it has to change over in the middle of a stream, many times.
func bulkAndQuiet(t *testing.T, p Path, s Size) {
	client, server := p.Dial(t)
	defer client.Close()
	defer server.Close()
	way := func(from, to net.Conn) error {
		for range 12 {
			if err := transfer(from, to, 256<<10+rand.Int64N(1<<20)); err != nil {
				return err
			}
			for range 20 {
				if err := transfer(from, to, 1+rand.Int64N(3000)); err != nil {
					return err
				}
			}
			time.Sleep(time.Duration(rand.Int64N(int64(5 * time.Millisecond))))
		}
		// and without waiting for the reader in between
		out := newStream()
		in := *out
		sent := make(chan error, 1)
		const bursts, burst, message = 10, 300_001, 977
		go func() {
			for range bursts {
				err := errors.Join(out.send(from, burst), out.sendBy(from, 30*message, message))
				if err != nil {
					sent <- err
					return
				}
			}
			sent <- nil
		}()
		return joinSender(in.receive(to, bursts*(burst+30*message)), from, sent)
	}
	other := make(chan error, 1)
	go func() { other <- way(server, client) }()
	must(t, way(client, server))
	must(t, <-other)
}

func byteSegments(t *testing.T, p Path, s Size) {
	bothRoles(t, p, func(t *testing.T, from, to net.Conn) {
		if c, ok := from.(*net.TCPConn); ok {
			must(t, c.SetNoDelay(true))
		}
		out := newStream()
		in := *out
		const n = 3000
		sent := make(chan error, 1)
		go func() { sent <- errors.Join(out.sendBy(from, n, 1), closeWrite(from)) }()
		must(t, in.receive(to, n))
		must(t, wantEOF(to))
		must(t, <-sent)
	})
}

// fill writes until nothing more is taken, and gives the number of bytes.
func fill(c net.Conn, s *stream) int64 {
	start := s.pos
	for {
		c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		n, err := c.Write(s.next(64 << 10))
		s.pos += int64(n)
		if err != nil {
			return s.pos - start
		}
	}
}

func readerStops(t *testing.T, p Path, s Size) {
	client, server := p.Dial(t)
	defer client.Close()
	defer server.Close()
	way := func(from, to net.Conn) error {
		out := newStream()
		in := *out
		for range 3 {
			n := fill(from, out)
			time.Sleep(s.Stop / 3)
			if err := in.receive(to, n); err != nil {
				return err
			}
			if err := transfer(from, to, 1000); err != nil {
				return err
			}
		}
		return transferAll(from, to, 1<<20)
	}
	other := make(chan error, 1)
	go func() { other <- way(server, client) }()
	must(t, way(client, server))
	must(t, <-other)
}

func zeroWindow(t *testing.T, p Path, s Size) {
	bothRoles(t, p, func(t *testing.T, from, to net.Conn) {
		if c, ok := to.(*net.TCPConn); ok {
			must(t, c.SetReadBuffer(8<<10))
		}
		out := newStream()
		in := *out
		n := int64(100 << 10) // little: a small window makes it slow
		sent := make(chan error, 1)
		go func() { sent <- out.send(from, n) }()
		time.Sleep(min(s.Stop, 3*time.Second))
		for range 50 { // open the window by little, again and again
			must(t, in.receive(to, 100))
			n -= 100
			time.Sleep(time.Millisecond)
		}
		must(t, in.receive(to, n))
		must(t, <-sent)
		must(t, transferAll(from, to, 64<<10))
	})
}

// urgentByte: an urgent byte in the middle neither corrupts nor holds up the bytes around it. It may be
// dropped (a relay without SO_OOBINLINE does that), or arrive in its place.
func urgentByte(t *testing.T, p Path, s Size) {
	const after = 5000
	// Without bulk, with it, and with a reader that comes late.
	for _, before := range []int64{10, 2 << 20, 24 << 20} {
		for _, fin := range []bool{false, true} {
			bothRoles(t, p, func(t *testing.T, from, to net.Conn) {
				out := newStream()
				in := *out
				sent := make(chan error, 1)
				go func() {
					err := errors.Join(out.send(from, before), sendUrgent(from, '!'), out.send(from, after))
					if fin {
						err = errors.Join(err, closeWrite(from))
					}
					sent <- err
				}()
				time.Sleep(time.Duration(before/(1<<20)) * 3 * time.Millisecond)
				must(t, in.receive(to, before))
				must(t, in.receiveAround(to, '!', after))
				must(t, <-sent)
				if fin {
					must(t, wantEOF(to))
				} else {
					must(t, transferAll(from, to, 100<<10))
				}
				must(t, transferAll(to, from, 100<<10))
			})
		}
	}
}

// receiveAround is receive with one more byte that may or may not come first.
func (s *stream) receiveAround(c net.Conn, urgent byte, n int) error {
	buf := make([]byte, n+1)
	c.SetReadDeadline(time.Now().Add(patience))
	if m, err := io.ReadFull(c, buf[:n]); err != nil {
		return fmt.Errorf("after the urgent byte, having got %d bytes: %w", m, err)
	}
	if without := *s; without.compare(buf[:n]) == nil {
		*s = without
		return nil
	}
	if buf[0] != urgent {
		return s.compare(buf[:n])
	}
	if _, err := io.ReadFull(c, buf[n:]); err != nil {
		return err
	}
	return s.compare(buf[1:])
}

// keepAlive: probes on both halves of an idle flow are answered, and leave the streams alone.
func keepAlive(t *testing.T, p Path, s Size) {
	client, server := p.Dial(t)
	defer client.Close()
	defer server.Close()
	for _, c := range []net.Conn{client, server} {
		must(t, c.(*net.TCPConn).SetKeepAliveConfig(net.KeepAliveConfig{
			Enable: true, Idle: time.Second, Interval: time.Second, Count: 2,
		}))
	}
	must(t, transfer(client, server, 1000))
	time.Sleep(2200 * time.Millisecond)
	must(t, Exchange(client, server, 1000, 1000))
}
