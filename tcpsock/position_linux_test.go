package tcpsock

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Where a socket's streams are is told rightly, whichever end has dialled and whatever has ended.
func TestPosition(t *testing.T) {
	for name, isDialled := range map[string]bool{"dialled": true, "accepted": false} {
		t.Run(name, func(t *testing.T) {
			own, other := pair(t)
			if !isDialled {
				own, other = other, own
			}
			base := positionOf(t, own).Written
			if base > 1 {
				t.Fatalf("%d bytes are written before the first", base)
			}
			b := make([]byte, 100)
			want := Position{Written: base}
			step := func(when string) {
				t.Helper()
				until(t, when, func() bool { return positionOf(t, own) == want })
			}
			step("nothing has moved")
			write(t, other, 10)
			await(t, own, func(i *unix.TCPInfo) bool { return i.Bytes_received == 10 })
			step("10 bytes are unread")
			read(t, own, b[:4])
			want.Read = 4
			step("6 bytes are unread")
			write(t, own, 7)
			want.Written += 7
			step("7 bytes are written")
			if err := other.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			want.IsEnded = true
			step("a FIN is behind 6 unread bytes")
			read(t, own, b[:6])
			want.Read = 10
			step("a FIN is unread")
			if n, err := own.Read(b); n != 0 || err != io.EOF {
				t.Fatalf("%d, %v", n, err)
			}
			step("a FIN was read")
			write(t, own, 3)
			want.Written += 3
			step("3 bytes are written after a FIN")
		})
	}
}

// The same of the end that we have sent: while it waits behind bytes that the reader has no room for, when it
// is acknowledged, and when the other end's comes at the same time.
func TestPositionShut(t *testing.T) {
	own, other := pair(t)
	want := Position{Written: positionOf(t, own).Written + fill(t, own), IsShut: true}
	if err := own.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	state := func(want uint8) {
		t.Helper()
		await(t, own, func(i *unix.TCPInfo) bool { return i.State == want })
	}
	state(finWait1)
	if got := positionOf(t, own); got != want {
		t.Errorf("with a FIN that has to wait: %+v, want %+v", got, want)
	}
	write(t, other, 5)
	await(t, own, func(i *unix.TCPInfo) bool { return i.Bytes_received == 5 })
	if got := positionOf(t, own); got != want {
		t.Errorf("with 5 bytes unread, too: %+v, want %+v", got, want)
	}
	if err := other.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	state(closing)
	want.IsEnded = true
	if got := positionOf(t, own); got != want {
		t.Errorf("when both ends have ended: %+v, want %+v", got, want)
	}
	if _, err := io.Copy(io.Discard, other); err != nil {
		t.Fatal(err)
	}
	state(Closed)
	if _, err := PositionOf(fdOf(t, own)); !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("over: %v", err)
	}
	own, _ = pair(t)
	want = Position{Written: positionOf(t, own).Written, IsShut: true}
	if err := own.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	state(finWait2)
	if got := positionOf(t, own); got != want {
		t.Errorf("with a FIN that is acknowledged: %+v, want %+v", got, want)
	}
	own, other = pair(t)
	filled := fill(t, own)
	want = Position{Written: positionOf(t, own).Written, IsEnded: true, IsShut: true}
	if want.Written < filled {
		t.Errorf("%d bytes are written of %d", want.Written, filled)
	}
	if err := errors.Join(other.CloseWrite(), own.CloseWrite()); err != nil {
		t.Fatal(err)
	}
	state(lastAck)
	if got := positionOf(t, own); got != want {
		t.Errorf("when the other end has ended first: %+v, want %+v", got, want)
	}
	if _, err := PositionOf(-1); err == nil {
		t.Error("what is no socket has a position")
	}
}

// What a copier has written less what it has read stays the same when nothing is in its hands, also when it
// has stopped in the middle of a stream, and after the end.
func TestPositionOfCopy(t *testing.T) {
	client, down := pair(t)
	up, server := pair(t)
	offset := func() uint64 { return positionOf(t, up).Written - positionOf(t, down).Read }
	want := offset()
	go func() {
		client.Write(make([]byte, 1<<20))
		client.CloseWrite()
	}()
	go io.Copy(io.Discard, server)
	for total, done := 0, false; !done; {
		n, err := io.CopyN(onlyWriter{up}, onlyReader{down}, 60_000)
		total += int(n)
		if err == io.EOF {
			if done = true; total != 1<<20 {
				t.Errorf("%d bytes have come", total)
			}
		} else if err != nil {
			t.Fatal(err)
		}
		if got := offset(); got != want {
			t.Errorf("the offset after %d bytes is %d, it was %d", total, got, want)
		}
	}
	up.CloseWrite()
	if got := offset(); got != want {
		t.Errorf("the offset after the end is %d, it was %d", got, want)
	}
}

type (
	onlyReader struct{ io.Reader }
	onlyWriter struct{ io.Writer }
)

func positionOf(t *testing.T, c net.Conn) (p Position) {
	t.Helper()
	p, err := PositionOf(fdOf(t, c))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func fdOf(t *testing.T, c net.Conn) int { return ask(t, c, func(fd int) int { return fd }) }

func await(t *testing.T, c net.Conn, what func(*unix.TCPInfo) bool) {
	t.Helper()
	until(t, "the connection to change", func() bool {
		var i unix.TCPInfo
		if err := Info(fdOf(t, c), &i); err != nil {
			t.Fatal(err)
		}
		return what(&i)
	})
}

func until(t *testing.T, when string, what func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !what(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", when)
		}
	}
}

func write(t *testing.T, c net.Conn, n int) {
	t.Helper()
	if _, err := c.Write(make([]byte, n)); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, c net.Conn, b []byte) {
	t.Helper()
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatal(err)
	}
}

// fill writes until there is no room, and gives how many bytes that took.
func fill(t *testing.T, c *net.TCPConn) (n uint64) {
	t.Helper()
	for b := make([]byte, 1<<16); ; {
		m, err := unix.SendmsgN(fdOf(t, c), b, nil, nil, unix.MSG_DONTWAIT)
		if n += uint64(max(m, 0)); err == unix.EAGAIN {
			var i unix.TCPInfo
			if Info(fdOf(t, c), &i); i.Notsent_bytes > 0 && i.Snd_wnd < i.Snd_mss {
				return n
			}
			time.Sleep(time.Millisecond)
		} else if err != nil {
			t.Fatal(err)
		}
	}
}
