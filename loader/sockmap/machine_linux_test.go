//go:build machine

package sockmap

import (
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/prove"
)

// Tests of this file change what the whole machine has: scripts/test-kernels runs them, on one of their own.

const tcpMem = "/proc/sys/net/ipv4/tcp_mem"

// TestOwesMemory: a socket that has passed bytes owes TCP memory, and takes none when TCP has none to give. It
// says EFAULT. The flow waits, and all arrives when there is memory again.
func TestOwesMemory(t *testing.T) {
	loadertest.NeedRoot(t)
	was, err := os.ReadFile(tcpMem)
	loadertest.Must(t, err)
	restore := func() { loadertest.Must(t, os.WriteFile(tcpMem, was, 0)) }
	t.Cleanup(restore)
	l := open(t, nil, 16)
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{Before: func(client, server, _, up *net.TCPConn) {
		// The window of one is closed soon, and what is not sent waits where the kernel adds to it.
		loadertest.Must(t, server.SetReadBuffer(4<<10))
	}})
	f := l.live[firstLive(l)].Load()
	up, down := &f.directions[0], &f.directions[1]
	upstream := f.sockets[1]
	p.Client.SetDeadline(time.Now().Add(loadertest.Patience))
	p.Server.SetDeadline(time.Now().Add(loadertest.Patience))

	request := prove.Pattern(300 << 10)
	_, err = p.Client.Write(request)
	loadertest.Must(t, err)
	loadertest.WaitFor(t, func() bool {
		var i unix.TCPInfo
		return up.moved() == uint64(len(request)) && upstream.info(&i) == nil && i.Notsent_bytes > 8<<10
	}, "upstream's window to close")
	answer := 0
	send := func(n int) {
		t.Helper()
		_, err := p.Server.Write(make([]byte, n))
		loadertest.Must(t, err)
		answer += n
		loadertest.WaitFor(t, func() bool { return down.handled() == uint64(answer) }, "the verdict on an answer")
	}
	isStuck := func() bool {
		f.watchMu.Lock()
		defer f.watchMu.Unlock()
		return f.watched[0]&unix.EPOLLOUT != 0
	}
	for send(64 << 10); !isStuck(); {
		send(64 << 10)
	}
	upstream.widen(1 << 20) // as makeWay does: the kernel makes it no smaller then, so that a write is refused

	var more []byte
	for { // the direction down may read once more, and pay the debt
		send(1000)
		loadertest.Must(t, os.WriteFile(tcpMem, []byte("1 1 1"), 0))
		n, err := upstream.write([]byte("x"))
		t.Logf("a write of one byte: %d, %v", n, err)
		if err == unix.EFAULT {
			break
		}
		restore()
		loadertest.Must(t, err)
		if more = append(more, 'x'); len(more) > 100 {
			t.Fatal("upstream takes what it is given: this test proves nothing")
		}
	}
	_, err = p.Client.Write(request[:1000])
	more = append(more, request[:1000]...)
	loadertest.Must(t, err)
	loadertest.WaitFor(t, func() bool { return f.isOver.Load() || up.hasTimer.Load() }, "the write to be tried")
	restore()
	if b := f.broken.Load(); b != nil {
		t.Fatalf("the flow has ended: %v", b.err)
	}
	loadertest.Must(t, prove.Expect(p.Server, request))
	loadertest.Must(t, prove.Expect(p.Server, more))
	if n, err := io.Copy(io.Discard, io.LimitReader(p.Client, int64(answer))); n != int64(answer) || err != nil {
		t.Errorf("%d of %d bytes, %v", n, answer, err)
	}
}
