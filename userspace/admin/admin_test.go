package admin

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func serve(t *testing.T, d Daemon) Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "run", "control.sock")
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	if d.Log == nil {
		d.Log = slog.New(slog.DiscardHandler)
	}
	go func() {
		Serve(ctx, ln, d.Handler(), slog.New(slog.DiscardHandler))
		close(done)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		if _, err := os.Stat(path); err == nil {
			t.Error("the socket file is left behind")
		}
	})
	return Client{Socket: path}
}

func TestClient(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var notes []string
	var reload error
	c := serve(t, Daemon{
		Status: func() any { return map[string]int{"flows": 7} },
		Flows: func(q url.Values) (any, error) {
			if q.Get("client") == "x" {
				return nil, errors.New("client x")
			}
			return []string{"a" + q.Get("name")}, nil
		},
		Top: func(ctx context.Context, q url.Values, send func(any) error) error {
			if q.Get("interval") == "" {
				return errors.New("no interval")
			}
			return errors.Join(send(1), send(2))
		},
		Reload: func(context.Context) ([]string, error) { return notes, reload },
	})
	var status map[string]int
	if err := c.Get(ctx, "status", &status); err != nil || status["flows"] != 7 {
		t.Errorf("status: %v %v", status, err)
	}
	var flows []string
	if err := c.Get(ctx, "flows?name=b", &flows); err != nil || !slices.Equal(flows, []string{"ab"}) {
		t.Errorf("flows: %v %v", flows, err)
	}
	if err := c.Get(ctx, "flows?client=x", &flows); err == nil || err.Error() != "client x" {
		t.Errorf("flows of a wrong query: %v", err)
	}
	var lines string
	err := c.Lines(ctx, "top?interval=1s", func(b []byte) error { lines += string(b); return nil })
	if lines != "1\n2\n" || err == nil || !strings.Contains(err.Error(), "has ended") {
		t.Errorf("top: %q %v", lines, err)
	}
	if err := c.Lines(ctx, "top", nil); err == nil || err.Error() != "no interval" {
		t.Errorf("top of a wrong query: %v", err)
	}
	if err := c.Lines(ctx, "top?interval=1s", func([]byte) error { return io.EOF }); err != io.EOF {
		t.Errorf("top whose reader has enough: %v", err)
	}
	if got, err := c.Reload(ctx); err != nil || got != "" {
		t.Errorf("reload: %q %v", got, err)
	}
	notes = []string{"this is odd", "and that"}
	if got, err := c.Reload(ctx); err != nil || got != "this is odd\nand that\n" {
		t.Errorf("reload with notes: %q %v", got, err)
	}
	reload = errors.New("edge.yaml:3:5: unknown key\nedge.yaml:4:5: unknown key")
	if _, err := c.Reload(ctx); err == nil || err.Error() != reload.Error() {
		t.Errorf("reload error: %v", err)
	}
	fi, err := os.Stat(c.Socket)
	if err != nil || fi.Mode().Perm() != socketMode {
		t.Errorf("mode %v %v: want %o", fi.Mode(), err, socketMode)
	}
}

func TestListenRefusesALiveDaemonAndReplacesADeadOne(t *testing.T) {
	c := serve(t, Daemon{})
	if _, err := Listen(c.Socket); err == nil || !strings.Contains(err.Error(), "another daemon") {
		t.Errorf("second daemon: %v", err)
	}
	path := filepath.Join(t.TempDir(), "dead.sock")
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ln.(*socket).UnixListener.Close() // leaves the file, as a killed daemon does
	ln, err = Listen(path)
	if err != nil {
		t.Fatalf("stale socket: %v", err)
	}
	ln.Close()
}

func TestListenRefusesToReplaceAFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notes.txt")
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if ln, err := Listen(path); err == nil {
		ln.Close()
		t.Error("a file was replaced by a socket")
	}
	if b, _ := os.ReadFile(path); string(b) != "precious" {
		t.Errorf("the file holds %q now", b)
	}
}

func TestNoDaemon(t *testing.T) {
	_, err := Client{Socket: filepath.Join(t.TempDir(), "none")}.Reload(t.Context())
	if err == nil || !strings.Contains(err.Error(), "tailsplice run") {
		t.Errorf("got %v: want a hint", err)
	}
}

// pipes is a listener whose connections are made by dial, in memory.
type pipes struct {
	conns chan net.Conn
	ended chan struct{}
}

func (p pipes) dial() net.Conn {
	client, server := net.Pipe()
	p.conns <- server
	return client
}

func (p pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.ended:
		return nil, net.ErrClosed
	}
}

func (p pipes) Close() error {
	select {
	case <-p.ended:
	default:
		close(p.ended)
	}
	return nil
}

func (p pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipes", Net: "unix"} }

// TestServeLeaves: who has connected before another process accepts is answered, and then the server ends.
func TestServeLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := pipes{make(chan net.Conn), make(chan struct{})}
		answer := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello") })
		ended := make(chan struct{})
		go func() {
			Serve(t.Context(), ln, answer, slog.New(slog.DiscardHandler))
			close(ended)
		}()
		conn, silent := ln.dial(), ln.dial()
		defer silent.Close()
		synctest.Wait()
		ln.Close()
		synctest.Wait()
		go io.WriteString(conn, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		conn.SetReadDeadline(time.Now().Add(time.Hour)) // a bubble may not hang
		if said, err := io.ReadAll(conn); err != nil || !strings.HasSuffix(string(said), "hello") {
			t.Errorf("%q, %v", said, err)
		}
		<-ended
	})
}

// TestIdleClients checks that no client is kept for ever: none that has its answer and asks for nothing more,
// none that sends half a request or nothing, and none that takes half an answer.
func TestIdleClients(t *testing.T) {
	const request = "GET / HTTP/1.1\r\nHost: a\r\n\r\n"
	for name, c := range map[string]struct {
		send string
		read int
	}{
		"has its answer":         {request, 1 << 20},
		"says nothing":           {"", 0},
		"sends half a header":    {request[:20], 0},
		"sends half a body":      {strings.Replace(request, "\r\n\r\n", "\r\nContent-Length: 9\r\n\r\nhalf", 1), 1 << 20},
		"takes half the answer":  {request, 1},
		"takes nothing at all":   {request, 0},
		"asks on without taking": {strings.Repeat(request, 9), 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ln := pipes{make(chan net.Conn), make(chan struct{})}
				ctx, cancel := context.WithCancel(t.Context())
				answer := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					io.Copy(io.Discard, r.Body)
					io.WriteString(w, strings.Repeat("x", 1<<20))
				})
				go Serve(ctx, ln, answer, slog.New(slog.DiscardHandler))
				conn := ln.dial()
				go io.WriteString(conn, c.send)
				conn.SetReadDeadline(time.Now().Add(time.Hour)) // a bubble may not hang
				if c.read > 0 {
					if _, err := io.CopyN(io.Discard, conn, int64(c.read)); err != nil {
						t.Error(err)
					}
				}
				time.Sleep(2*writeTimeout + idleTimeout)
				conn.SetWriteDeadline(time.Now().Add(time.Minute))
				if _, err := conn.Write([]byte{'\n'}); !errors.Is(err, io.ErrClosedPipe) {
					t.Errorf("the connection is kept: %v", err)
				}
				conn.Close()
				cancel()
				<-ln.ended
			})
		})
	}
}

// TestHealthIsNotStarved: whoever asks for health is answered, however many connections others hold, whether
// those say nothing, send half a request, or had an answer and could ask for more. They are not kept for long.
func TestHealthIsNotStarved(t *testing.T) {
	const request = "GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
	h := Health{Alive: func(context.Context) error { return nil }}
	for name, send := range map[string]string{"silent": "", "half": request[:20], "answered": request} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ln := pipes{make(chan net.Conn), make(chan struct{})}
				ctx, cancel := context.WithCancel(t.Context())
				go ServeHealth(ctx, ln, h, slog.New(slog.DiscardHandler))
				var held []net.Conn
				dial := func(send string) net.Conn {
					conn := ln.dial()
					conn.SetDeadline(time.Now().Add(time.Hour)) // a bubble may not hang
					go io.WriteString(conn, send)
					return conn
				}
				for range 2 * maxConnections {
					held = append(held, dial(send))
				}
				synctest.Wait()
				asked := time.Now()
				good := dial(request)
				if answer, err := io.ReadAll(good); err != nil || !strings.Contains(string(answer), "alive") {
					t.Errorf("%q, %v", answer, err)
				}
				if took := time.Since(asked); took > 0 { // by the bubble's clock
					t.Errorf("the answer took %v", took)
				}
				good.Close()
				time.Sleep(2*healthTimeout + time.Second)
				for _, conn := range held {
					if _, err := io.Copy(io.Discard, conn); err != nil || time.Since(asked) > 3*healthTimeout {
						t.Fatalf("a connection is kept: %v", err)
					}
					conn.Close()
				}
				cancel()
				<-ln.ended
			})
		})
	}
}
