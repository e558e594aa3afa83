package admin

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// account is who connects.
type account struct {
	uid, gid int
	groups   []uint32
}

// dialAs connects to a socket as another account, by a thread that is not used again.
func dialAs(socket string, who account) (net.Conn, error) {
	var conn net.Conn
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if err = takeAccount(who); err != nil {
			return
		}
		conn, err = net.Dial("unix", socket)
	}()
	<-done
	return conn, err
}

// takeAccount changes the thread's account, and not the process's as package syscall does.
func takeAccount(who account) error {
	groups := append(slices.Clone(who.groups), 0) // one more, so that there is something to point at
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(who.groups)), uintptr(unsafe.Pointer(&groups[0])), 0); e != 0 {
		return e
	}
	for _, call := range []struct{ number, id uintptr }{{unix.SYS_SETRESGID, uintptr(who.gid)}, {unix.SYS_SETRESUID, uintptr(who.uid)}} {
		if _, _, e := unix.RawSyscall(call.number, call.id, call.id, call.id); e != 0 {
			return e
		}
	}
	return nil
}

// TestPeers: root and the daemon's user may change, the group of the socket may look, others may not connect. Each
// change is logged with who asked, whatever the log's level is.
func TestPeers(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	const group, user = 54321, 54322
	dir, err := os.MkdirTemp("", "ts-peers-") // t.TempDir's are for root alone
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chown(dir, 0, group); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755|os.ModeSetgid); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "control.sock")
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	var log lockedBuffer
	changed := 0
	d := Daemon{
		Status: func() any { return 1 },
		Reload: func(context.Context) ([]string, error) { changed++; return nil, nil },
		Log:    slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelError})),
	}
	go Serve(t.Context(), ln, d.Handler(), d.Log)

	for _, c := range []struct {
		name         string
		who          account
		look, change string
	}{
		{"root", account{}, "200", "200"},
		{"root in another group", account{0, user, []uint32{user}}, "200", "200"},
		{"the group", account{user, group, nil}, "200", "403"},
		{"one more group of a user", account{user, user, []uint32{7, group}}, "200", "403"},
		{"a stranger", account{user, user, []uint32{7}}, "no", "no"},
		{"a stranger who has root's group", account{user, 0, nil}, "no", "no"},
	} {
		ask := func(method, noun string) (status, text string) {
			conn, err := dialAs(path, c.who)
			if err != nil {
				return "no", err.Error()
			}
			defer conn.Close()
			fmt.Fprintf(conn, "%s /v1/%s HTTP/1.1\r\nHost: x\r\n\r\n", method, noun)
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				return "no", err.Error()
			}
			b, _ := io.ReadAll(res.Body)
			return fmt.Sprint(res.StatusCode), string(b)
		}
		if got, text := ask("GET", "status"); got != c.look {
			t.Errorf("%s looks: %s %s, want %s", c.name, got, text, c.look)
		}
		log.Reset()
		before := changed
		got, text := ask("POST", "reload")
		if got != c.change || changed-before != map[string]int{"200": 1}[c.change] {
			t.Errorf("%s changes: %s %s, %d times, want %s", c.name, got, text, changed-before, c.change)
		}
		said := fmt.Sprintf("change=reload uid=%d pid=%d", c.who.uid, os.Getpid())
		if line := log.String(); c.change != "no" && !strings.Contains(line, said) || c.change == "no" && line != "" ||
			(c.change == "403") != strings.Contains(line, "refused") {
			t.Errorf("%s: the log says %q, want %q", c.name, line, said)
		}
		if c.change == "403" && !strings.Contains(text, "user 54322 may look, and change nothing: use root, or the account that runs the daemon (user 0)") {
			t.Errorf("%s is told %q", c.name, text)
		}
	}
}

// TestOwnUser: a daemon that is not root's is its user's to change.
func TestOwnUser(t *testing.T) {
	for uid, want := range map[int]bool{0: true, os.Geteuid(): true, os.Geteuid() + 1: false} {
		if got := (Peer{UID: uid}).mayChange(); got != want {
			t.Errorf("user %d: %v", uid, got)
		}
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func (b *lockedBuffer) Reset() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.b.Reset()
}
