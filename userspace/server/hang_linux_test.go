package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/handover"
)

// TestServes: a change that does not end and a listener where nobody accepts are found, and are over when they are.
//
// +checklocksignore: the analyzer does not know that a test is the only one
func TestServes(t *testing.T) {
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf("listeners: [{ name: web, listen: [%q], mode: tcp, default: { forward: %q } }]\n", addr, freeAddr(t)))
	serves := func(within time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), within)
		defer cancel()
		return d.Serves(ctx)
	}
	well := func(when string) {
		t.Helper()
		for range 2 {
			if err := serves(time.Minute); err != nil {
				t.Fatalf("%s: %v", when, err)
			}
		}
	}
	well("at first")
	d.mu.Lock()
	for range 3 {
		if err := serves(20 * time.Millisecond); !errors.Is(err, errLocked) {
			t.Errorf("a change does not end: %v, want %v", err, errLocked)
		}
	}
	d.mu.Unlock()
	well("after a change")

	s := d.sockets[addr]
	s.loop.Stop()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if _, waits := s.queue(); waits {
			break
		}
		if time.Now().After(end) {
			t.Fatal("nobody waits")
		}
	}
	if err := serves(time.Minute); err != nil {
		t.Errorf("somebody has just come: %v", err)
	}
	for range 2 {
		if err := serves(time.Minute); err == nil || !strings.Contains(err.Error(), "connections wait at "+addr) {
			t.Errorf("nobody accepts: %v", err)
		}
	}
	s.prepare(d.Server)
	s.accept()
	c.SetDeadline(time.Now().Add(time.Minute))
	if _, err := io.ReadAll(c); err != nil && !errors.Is(err, syscall.ECONNRESET) { // its target refuses
		t.Fatal(err)
	}
	well("accepted again")
}

// TestUnwanted: a socket that the configuration does not name is another process's until this one accepts, and is closed
// for all who have it then. A server that ends before leaves it as it is.
func TestUnwanted(t *testing.T) {
	for _, accepts := range []bool{false, true} {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		file, err := ln.(*net.TCPListener).File()
		if err != nil {
			t.Fatal(err)
		}
		var moved atomic.Int64
		d := startOptions(t, parse(t, fmt.Sprintf("listeners: [{ name: web, listen: [%q], mode: tcp, default: { forward: %q } }]\n",
			freeAddr(t), freeAddr(t))), Options{Held: true, Moved: func() { moved.Add(1) },
			Handed: []handover.Socket{{Kind: handover.KindListener, Name: "old", Address: ln.Addr().String(), File: file}}})
		connect := func() error {
			c, err := net.Dial("tcp", ln.Addr().String())
			if err == nil {
				c.Close()
			}
			return err
		}
		if err := connect(); err != nil {
			t.Errorf("before this process accepts: %v", err)
		}
		if accepts {
			d.Accept()
		} else {
			d.Close()
		}
		if err := connect(); errors.Is(err, syscall.ECONNREFUSED) != accepts {
			t.Errorf("accepts %v: %v", accepts, err)
		}
		if moved.Load() == 0 {
			t.Error("nobody is told that what is bound has changed")
		}
		bound, err := d.Bound()
		handover.Close(bound)
		if want := map[bool]int{true: 1}[accepts]; err != nil || len(bound) != want {
			t.Errorf("bound are %d sockets (%v), want %d", len(bound), err, want)
		}
	}
}

// TestResumeEnded: a process that has begun to accept, and ended a socket that its configuration does not name, may fail
// yet. The one that goes on binds that socket's address anew. A loop does not turn about one that was ended.
//
// +checklocksignore: the analyzer does not know that a test is the only one
func TestResumeEnded(t *testing.T) {
	kept, ended := freeAddr(t), freeAddr(t)
	d := start(t, fmt.Sprintf("listeners: [{ name: web, listen: [%q, %q], mode: tcp, default: { forward: %q } }]\n", kept, ended, backend(t, named("A", new(atomic.Int64)))))
	if d.failed(d.sockets[kept], os.NewSyscallError("accept4", syscall.EINVAL)) {
		t.Error("a socket that was ended is tried again at once")
	}
	bound, err := d.Sockets()
	if err != nil {
		t.Fatal(err)
	}
	d.Pause()
	other := startOptions(t, parse(t, fmt.Sprintf("listeners: [{ name: web, listen: [%q], mode: tcp, default: { forward: %q } }]\n", kept, freeAddr(t))),
		Options{Held: true, Handed: bound})
	other.Accept()
	other.Pause() // it dies
	d.Resume()
	for _, addr := range []string{kept, ended} {
		if got, err := exchange(addr, []byte("x")); err != nil || string(got) != "Ax" {
			t.Errorf("%s: %q, %v", addr, got, err)
		}
	}
}
