package sockmap

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/prove"
)

// Bytes that came before the splice, unread, read in part, and read to the end.
func TestSenderIsEarly(t *testing.T) {
	l := open(t, nil, 16)
	for _, c := range []struct{ sent, read int }{
		{1, 0}, {16, 6}, {100000, 0}, {100000, 1}, {100000, 99999}, {100000, 100000}, {1 << 20, 70000},
	} {
		t.Run(fmt.Sprintf("%d read of %d", c.read, c.sent), func(t *testing.T) {
			data := prove.Pattern(c.sent)
			p := loadertest.SplicePath(t, l, loadertest.PathOptions{Before: func(client, _, down, _ *net.TCPConn) {
				go client.Write(data)
				if err := prove.Expect(down, data[:c.read]); err != nil {
					t.Fatal(err)
				}
				if c.read == 0 {
					time.Sleep(20 * time.Millisecond)
				}
			}})
			p.Server.SetDeadline(time.Now().Add(loadertest.Patience))
			if err := prove.Expect(p.Server, data[c.read:]); err != nil {
				t.Error(err)
			}
			if up, _ := p.Count(); up != int64(c.sent-c.read) {
				t.Errorf("counted %d", up)
			}
		})
	}
}

func TestRuleKickOff(t *testing.T) {
	r := new(Hooks).Without(ruleKick, ruleSweep)
	l := open(t, r, 16)
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{Before: func(client, _, _, _ *net.TCPConn) {
		client.Write([]byte("hello"))
		time.Sleep(20 * time.Millisecond)
	}})
	p.Server.SetDeadline(time.Now().Add(time.Second))
	if _, err := p.Server.Read(make([]byte, 5)); !isTimeout(err) {
		t.Errorf("without a kick the queued bytes arrived anyhow: %v", err)
	}
}

// A reset that is told before the kick takes nothing away of what came before the splice.
func TestResetBeforeKick(t *testing.T) {
	r := new(Hooks).Without(ruleKick, ruleSweep)
	l := open(t, r, 16)
	data := prove.Pattern(20_000)
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{Before: func(client, _, _, _ *net.TCPConn) {
		client.Write(data)
		time.Sleep(20 * time.Millisecond)
	}})
	p.Client.SetLinger(0)
	p.Client.Close()
	p.Server.SetDeadline(time.Now().Add(loadertest.Patience))
	if got, err := io.ReadAll(p.Server); !bytes.Equal(got, data) || !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%d of %d bytes, %v", len(got), len(data), err)
	}
}

// What is refused is left as it was, and goes on in userspace.
func TestRefusal(t *testing.T) {
	l := open(t, nil, 1)
	loadertest.SplicePath(t, l, loadertest.PathOptions{})
	p, err := loadertest.TrySplice(t, l, loadertest.PathOptions{})
	if !errors.Is(err, refusedFull) {
		t.Fatalf("a second flow in one slot: %v", err)
	}
	relayed(t, p)

	l = open(t, nil, 4)
	p, err = loadertest.TrySplice(t, l, loadertest.PathOptions{Before: func(client, _, down, _ *net.TCPConn) {
		down.SetNoDelay(false)
		client.CloseWrite()
		time.Sleep(20 * time.Millisecond)
	}})
	if !errors.Is(err, RefusedState) {
		t.Fatalf("a side that has ended: %v", err)
	}
	raw, _ := p.Down.SyscallConn()
	raw.Control(func(fd uintptr) {
		if n, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NODELAY); n != 0 || err != nil {
			t.Errorf("TCP_NODELAY is %d, %v", n, err)
		}
	})
	if off, _ := l.Health(); l.flows() != 0 || off != "" {
		t.Errorf("%d flows, %q", l.flows(), off)
	}
}

// relayed checks that a refused pair of sockets works without us.
func relayed(t *testing.T, p *loadertest.Path) {
	t.Helper()
	go io.Copy(p.Up, p.Down)
	p.Client.Write([]byte("hello"))
	p.Server.SetDeadline(time.Now().Add(loadertest.Patience))
	if err := prove.Expect(p.Server, []byte("hello")); err != nil {
		t.Error(err)
	}
}

// The other side ends or breaks while a flow is being inserted.
func TestEndDuringInsertion(t *testing.T) {
	l := open(t, nil, 64)
	refused := 0
	for i := range 300 {
		data := prove.Pattern(1000)
		p, err := loadertest.TrySplice(t, l, loadertest.PathOptions{Before: func(_, server, _, _ *net.TCPConn) {
			go func() {
				for range i * 20 {
				}
				server.Write(data)
				server.CloseWrite()
			}()
		}})
		if err != nil {
			refused++
			continue
		}
		p.Client.SetDeadline(time.Now().Add(loadertest.Patience))
		got, rerr := io.ReadAll(p.Client)
		if rerr != nil || !bytes.Equal(got, data) {
			t.Fatalf("flow %d: %d bytes, %v", i, len(got), rerr)
		}
		if err := loadertest.Send(p.Client, p.Server, 1, 5000); err != nil {
			t.Fatal(err)
		}
		if r := p.Wait(loadertest.Patience); r.End != prove.EndEOF || r.Down != 1000 || r.Up != 5000 {
			t.Fatalf("flow %d ended %+v", i, r)
		}
	}
	t.Logf("%d of 300 refused", refused)
}

// Bare sockets are taken over, or left as they were, to who has them.
func TestSplice(t *testing.T) {
	l := open(t, nil, 1)
	ended := make(chan string, 1)
	splice := func() (client, server *net.TCPConn, fds [2]int, err error) {
		client, down := loadertest.Connect(t, "tcp4")
		up, server := loadertest.Connect(t, "tcp4")
		t.Cleanup(func() { client.Close(); server.Close() })
		for i, c := range []*net.TCPConn{down, up} {
			s, err := dup(c)
			loadertest.Must(t, err)
			c.Close()
			fds[i] = int(s)
		}
		_, err = l.Splice(t.Context(), fds[0], fds[1],
			Flow{Buffer: 1 << 20, Ended: func(_, _ int64, end string, _ error) { ended <- end }})
		return client, server, fds, err
	}
	client, server, taken, err := splice()
	loadertest.Must(t, err)
	_, _, left, err := splice()
	if !errors.Is(err, refusedFull) {
		t.Fatalf("a second flow in one slot: %v", err)
	}
	for _, fd := range left {
		loadertest.Must(t, unix.Close(fd))
	}
	loadertest.Must(t, errors.Join(loadertest.Send(client, server, 1, 1<<20), loadertest.Send(server, client, 2, 1<<20)))
	if end := <-ended; end != prove.EndEOF {
		t.Errorf("it ended with %q", end)
	}
	for _, fd := range taken {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != unix.EBADF {
			t.Errorf("descriptor %d: %v", fd, err)
		}
	}
}
