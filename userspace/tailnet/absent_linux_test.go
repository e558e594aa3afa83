package tailnet

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/test/logs"
	"github.com/tailsplice/tailsplice/userspace/follow"
)

var quiet = slog.New(slog.DiscardHandler)

func wantAbsent(t *testing.T, err error, says ...string) {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) || e.Kind != KindAbsent || e.Reason() != "no_tailscaled" {
		t.Fatalf("%v", err)
	}
	for _, s := range says {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%q does not say %q", err, s)
		}
	}
}

// TestAbsent: each way of there being no tailscaled is told apart, and every
// question gets that answer at once: a clock that moves only while everybody
// waits does not move.
func TestAbsent(t *testing.T) {
	dir := t.TempDir()
	dead := filepath.Join(dir, "dead")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	for _, c := range []struct {
		name, socket string
		says         []string
		cause        error
	}{
		{"no socket", dir + "/none", []string{"there is no socket " + dir + "/none", "systemctl enable --now tailscaled", "tailscale up", SocketEnv}, syscall.ENOENT},
		{"dead socket", dead, []string{"nothing listens on the socket " + dead, "systemctl start tailscaled"}, syscall.ECONNREFUSED},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				cl := New(c.socket, quiet)
				_, err := cl.Resolve(t.Context(), "home")
				wantAbsent(t, err, c.says...)
				if !errors.Is(err, c.cause) {
					t.Errorf("%v does not wrap %v", err, c.cause)
				}
				_, err = cl.WhoIs(t.Context(), netip.MustParseAddr("100.64.0.1"))
				wantAbsent(t, err, c.says...)
				_, err = cl.SelfAddrs(t.Context())
				wantAbsent(t, err, c.says...)
				_, err = cl.GetCertificate(&tls.ClientHelloInfo{ServerName: "home.tail1234.ts.net"})
				wantAbsent(t, err, c.says...)
				if _, err := cl.WhoIs(t.Context(), netip.MustParseAddr("192.0.2.1")); !errors.Is(err, ErrNotPeer) {
					t.Errorf("of an address that can't be the tailnet's: %v", err)
				}
				if _, _, ok := cl.Presence("home"); ok {
					t.Error("it knows a node")
				}
				if took := time.Since(began); took > 0 {
					t.Errorf("it waited for %s", took)
				}
			})
		})
	}
}

// TestPermission: a user whom the socket refuses is told so.
func TestPermission(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root, to become a user who is not the socket's")
		}
		t.Skip("needs root, to become a user who is not the socket's")
	}
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := os.Chmod(socket, 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never back: the thread ends with the goroutine
		unix.Setfsuid(65534)   // who the kernel takes this thread for, where files are concerned
		_, err := New(socket, quiet).dialSocket(context.Background(), "", "")
		done <- err
	}()
	wantAbsent(t, <-done, "no permission", socket, "as root", "--operator")
}

// TestHanging: a daemon that accepts and says nothing costs no more than the
// caller's patience, or a few seconds.
func TestHanging(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go io.Copy(io.Discard, c)
		}
	}()
	c := New(socket, quiet)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	began := time.Now()
	_, err = c.Resolve(ctx, "home")
	wantAbsent(t, err, "did not answer in time")
	if took := time.Since(began); took > askTimeout {
		t.Errorf("it took %s", took)
	}
	ctx, cancel = context.WithTimeout(t.Context(), time.Minute) // "in time" is told if it waits as long
	defer cancel()
	_, err = c.Resolve(ctx, "home")
	wantAbsent(t, err, "does not answer", socket)
	if took := time.Since(began); took < askTimeout {
		t.Errorf("it took %s", took)
	}
}

// TestRunWithout: a watch without a daemon rests, tells that once, and ends.
func TestRunWithout(t *testing.T) { synctest.Test(t, testRunWithout) }

func testRunWithout(t *testing.T) {
	var log logs.Log
	c := New(t.TempDir()+"/none", log.Logger())
	told := make(chan struct{}, 100)
	c.OnChange(func() { told <- struct{}{} })
	const span = time.Minute
	ctx, cancel := context.WithTimeout(t.Context(), span)
	defer cancel()
	const most = 20 + int(span/(follow.PauseMax/2)) // 20 until the pause is the longest
	tries, dial := 0, c.lc.Dial
	c.lc.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if tries++; tries > most {
			cancel()
		}
		return dial(ctx, network, addr)
	}
	c.Run(ctx)
	if n := log.Count("tailnet unavailable"); n != 1 {
		t.Errorf("it was logged %d times:\n%s", n, log.String())
	}
	if len(told) != 1 {
		t.Errorf("the loss was told %d times", len(told))
	}
	if tries < 2 || tries > most {
		t.Errorf("it tried %d times in %s: want 2 to %d", tries, span, most)
	}
}

func TestSocket(t *testing.T) {
	t.Setenv(SocketEnv, "/from/env")
	if s := New("", quiet).socket; s != "/from/env" {
		t.Error(s)
	}
	if s := New("/given", quiet).socket; s != "/given" {
		t.Error(s)
	}
	t.Setenv(SocketEnv, "")
	if s := New("", quiet).socket; !strings.HasSuffix(s, "tailscaled.sock") {
		t.Error(s)
	}
}
