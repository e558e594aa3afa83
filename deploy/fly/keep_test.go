package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestMain is also the program that edge starts, and those that stand for what docs/fly.md types.
func TestMain(m *testing.M) {
	if standIn := standIns[filepath.Base(os.Args[0])]; standIn != nil {
		if err := standIn(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if len(os.Args) > 2 && os.Args[1] == "exec" {
		fmt.Println(execute(os.Args[2:]))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// TestKeeper: sockets are kept by name, once each, are given to the program that is started next, and closed for all
// when they are dropped.
func TestKeeper(t *testing.T) {
	k, err := newKeeper(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer k.conn.Close()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	socket, err := ln.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	defer socket.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	say := func(text string, f *os.File) {
		t.Helper()
		c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		var oob []byte
		if f != nil {
			oob = syscall.UnixRights(int(f.Fd()))
		}
		if _, _, err := c.WriteMsgUnix([]byte(text), oob, &net.UnixAddr{Name: k.path, Net: "unixgram"}); err != nil {
			t.Fatal(err)
		}
	}
	heard := func() { // messages are heard in their order
		t.Helper()
		say("MAINPID=7", nil)
		select {
		case pid := <-k.main:
			if pid != 7 {
				t.Errorf("the main process is %d, want 7", pid)
			}
		case <-time.After(time.Minute):
			t.Fatal("nothing is heard")
		}
	}
	if k.hangs() {
		t.Error("it hangs before it has said anything")
	}
	say("FDSTORE=1\nFDNAME=a?b", socket)
	say("FDSTORE=1\nFDNAME=a?b", socket)
	say("FDSTORE=1\nFDNAME=gone", null)
	say("FDSTORE=1\nFDNAME=with:colon", null)
	say("FDNAME=nothing", null)
	say("FDSTOREREMOVE=1\nFDNAME=gone", nil)
	say("WATCHDOG=1", nil)
	heard()
	if k.hangs() {
		t.Error("it hangs, and has just said that it does not")
	}
	k.mu.Lock()
	k.fed = time.Now().Add(-2 * beat)
	k.mu.Unlock()
	if !k.hangs() {
		t.Error("it has said nothing for long, and does not hang")
	}

	env, files := k.environ()
	c := exec.Command("/proc/self/exe", "exec", "/bin/sh", "-c", "echo $LISTEN_PID $$ $LISTEN_FDS $LISTEN_FDNAMES $WATCHDOG_USEC; readlink /proc/self/fd/3")
	c.Env, c.ExtraFiles = append(os.Environ(), env...), files
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var pid, self, n, usec int
	var name, file string
	if _, err := fmt.Sscan(string(out), &pid, &self, &n, &name, &usec, &file); err != nil || pid != self || n != 1 || name != "a?b" ||
		usec != 30_000_000 || !strings.HasPrefix(file, "socket:") {
		t.Errorf("the program gets %s(%v)", out, err)
	}
	if k.hangs() {
		t.Error("a program that has just begun hangs")
	}

	again, err := net.FileListener(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	k.drop()
	if c, err := net.Dial("tcp", again.Addr().String()); err == nil {
		c.Close()
		t.Error("connections are accepted at a socket that was dropped")
	}
	if _, files := k.environ(); len(files) > 0 {
		t.Errorf("%d files are kept after that", len(files))
	}
}
