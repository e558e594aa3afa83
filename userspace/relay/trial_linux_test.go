package relay

import (
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestTrial: a direction is read in pieces until its reader has acknowledged enough, however much was written.
func TestTrial(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	dial := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 32<<10) })
	}}
	reader, err := dial.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	conn, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()

	f := (&Relay{}).newFlow(t.Context(), nil, nil, Options{}, nil)
	f.down.flow, f.up.flow = f, f
	s, buf := &f.up, make([]byte, bufferSize)
	raw, _ := conn.(*net.TCPConn).SyscallConn()
	onTrial := func() (is bool) {
		var part []byte
		raw.Control(func(fd uintptr) { part, is = s.piece(buf, int(fd)) })
		if want := map[bool]int{true: trialRead, false: len(buf)}[is]; len(part) != want {
			t.Errorf("on trial %v a read takes %d bytes, want %d", is, len(part), want)
		}
		return is
	}
	if !onTrial() {
		t.Error("a flow that has moved nothing is not on trial")
	}
	written := 0
	conn.SetWriteDeadline(time.Now().Add(time.Second)) // the reader has no room long before
	for err = nil; err == nil; {
		var n int
		n, err = conn.Write(buf)
		written += n
	}
	if s.moved().Store(int64(written)); written < trialBytes {
		t.Fatalf("%d bytes were taken for a reader who does not read, want more than %d", written, trialBytes)
	}
	if !onTrial() {
		t.Error("the trial is over before the reader has acknowledged anything but what its buffer holds")
	}
	if _, err := io.ReadFull(reader, make([]byte, written)); err != nil {
		t.Fatal(err)
	}
	for until := time.Now().Add(time.Minute); onTrial(); time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			t.Fatal("the trial is not over though all is read")
		}
	}
}
