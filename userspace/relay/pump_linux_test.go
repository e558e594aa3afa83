package relay

import (
	"bytes"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// A dst that can't splice gets the bytes that are in the pipe already all the same: a file opened for
// appending refuses with EINVAL.
func TestSpliceToRefused(t *testing.T) {
	name := filepath.Join(t.TempDir(), "f")
	file, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	f := &flow{relay: New(nil), counters: new(Counters)}
	f.down.flow, f.up.flow = f, f
	f.up.sock, _ = file.SyscallConn()
	want := bytes.Repeat([]byte("0123456789"), 6000)
	p := pump{relay: f.relay, src: &f.down, dst: &f.up, moved: new(atomic.Int64), limit: 1 << 20, isBulk: true,
		pipe: f.relay.pipes.get(), inPipe: len(want)}
	if n, err := unix.Write(p.pipe.w, want); n != len(want) {
		t.Fatal(n, err)
	}
	if err := p.dst.sock.Write(p.drainPipe); err != nil || p.err != nil {
		t.Fatal(err, p.err)
	}
	got, err := os.ReadFile(name)
	if !bytes.Equal(got, want) || p.moved.Load() != int64(len(want)) {
		t.Errorf("%d bytes written, %d counted, %v", len(got), p.moved.Load(), err)
	}
	if !p.cannotSplice || p.isBulk || p.inPipe != 0 {
		t.Errorf("the pump would splice again: %+v", &p)
	}
	f.relay.pipes.put(p.pipe)
}

// A src that can't splice is read: an eventfd refuses with EINVAL.
func TestSpliceFromRefused(t *testing.T) {
	fd, err := unix.Eventfd(42, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	f := &flow{relay: New(nil), counters: new(Counters)}
	f.down.flow, f.up.flow = f, f
	f.up.sock, _ = w.SyscallConn()
	p := pump{relay: f.relay, src: &f.down, dst: &f.up, moved: new(atomic.Int64), limit: 1 << 20, isBulk: true}
	p.flush, p.drain = p.flushOut, p.drainPipe
	if n, err := p.splice(fd); n != 8 || err != nil || p.err != nil || p.moved.Load() != 8 {
		t.Fatal(n, err, p.err, p.moved.Load())
	}
	if !p.cannotSplice || p.isBulk {
		t.Errorf("the pump would splice again: %+v", &p)
	}
}
