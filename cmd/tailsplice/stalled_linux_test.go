package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/test/cgroup"
	"github.com/tailsplice/tailsplice/test/freeaddr"
	"github.com/tailsplice/tailsplice/test/selfsigned"
	"github.com/tailsplice/tailsplice/userspace/server"
)

// stalledDaemon is a daemon of which nobody reads the log, for now.
type stalledDaemon struct {
	t       *testing.T
	cmd     *exec.Cmd
	control string
	log     *os.File // the end that is to be read
}

// startStalled starts it by way of a command that takes another one, if any is given.
func startStalled(t *testing.T, yaml string, by ...string) *stalledDaemon {
	t.Helper()
	dir, err := os.MkdirTemp("", "ts-cli-")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	d := &stalledDaemon{t: t, control: filepath.Join(dir, "control.sock")}
	file := filepath.Join(dir, "edge.yaml")
	check(t, os.WriteFile(file, fmt.Appendf(nil, "%s\ncontrol: { socket: %q }\n", yaml, d.control), 0o600))
	r, w, err := os.Pipe()
	check(t, err)
	t.Cleanup(func() { r.Close() })
	_, err = unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, 4096) // so that a few lines fill it
	check(t, err)
	command := append(by, "tailsplice", "run", "--config", file)
	d.log, d.cmd = r, exec.Command(command[0], command[1:]...)
	d.cmd.Stderr = w
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	check(t, d.cmd.Start())
	w.Close()
	t.Cleanup(func() { _ = d.cmd.Process.Kill() })
	wait(t, "the daemon answers", func() error { _, err := d.ask("status"); return err })
	return d
}

// ask asks the daemon by its control socket.
func (d *stalledDaemon) ask(args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(d.t.Context(), time.Minute)
	defer cancel()
	return exec.CommandContext(ctx, "tailsplice", append(args, "--control", d.control)...).CombinedOutput()
}

func (d *stalledDaemon) status() server.Status {
	d.t.Helper()
	out, err := d.ask("status", "--json")
	if err != nil {
		d.t.Fatalf("status: %v: %s", err, out)
	}
	var s server.Status
	check(d.t, json.Unmarshal(out, &s))
	return s
}

// ends waits for the daemon's end after TERM.
func (d *stalledDaemon) ends() {
	d.t.Helper()
	check(d.t, d.cmd.Process.Signal(syscall.SIGTERM))
	ended := make(chan error, 1)
	go func() { ended <- d.cmd.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			d.t.Errorf("TERM: %v", err)
		}
	case <-time.After(time.Minute):
		d.t.Error("TERM does not end the daemon")
	}
}

// TestNobodyReadsTheLog: what reads standard error has stopped, and the pipe to
// it is full. Requests, flows on each datapath, refused connections, reload and
// the end go on as ever; a reader that is back learns what it has missed.
func TestNobodyReadsTheLog(t *testing.T) {
	needRoot(t)
	cert, key := filepath.Join(t.TempDir(), "cert.pem"), filepath.Join(t.TempDir(), "key.pem")
	c := selfsigned.Certificate(t, "app.test")
	certPEM, keyPEM := selfsigned.PEM(t, c)
	check(t, os.WriteFile(cert, certPEM, 0o600))
	check(t, os.WriteFile(key, keyPEM, 0o600))
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "hello") }))
	defer app.Close()
	echo := func(ln net.Listener) net.Listener {
		go func() {
			for c, err := ln.Accept(); err == nil; c, err = ln.Accept() {
				go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
			}
		}()
		return ln
	}
	plain := echo(listen(t, "127.0.0.1:0")).Addr()
	local, _ := cgroup.Listen(t, "tcp4")
	datapaths := []string{"userspace", "auto", "sockmap", "sk_msg"}
	web, web6, secure, secure6 := freeaddr.Get(t), freeaddr.Of(t, "::1"), freeaddr.Get(t), freeaddr.Of(t, "::1")
	yaml := fmt.Sprintf(`
listeners:
  - { name: web, listen: [%q, %q], mode: http, default: { forward: %q } }
  - { name: secure, listen: [%q, %q], mode: https, certificates: [ { files: { cert: %q, key: %q } } ], default: { forward: %q } }
`, web, web6, app.Listener.Addr(), secure, secure6, cert, key, app.Listener.Addr())
	echo(local)
	edges := map[string]string{}
	for _, name := range datapaths {
		to := plain
		if name == "sk_msg" {
			to = local.Addr()
		}
		edges[name] = freeaddr.Get(t)
		yaml += fmt.Sprintf("  - { name: edge-%s, listen: [%q], mode: sni, default: { forward: %q, datapath: %s } }\n", name, edges[name], to, name)
	}
	strict := freeaddr.Get(t)
	yaml += fmt.Sprintf("  - { name: strict, listen: [%q], mode: sni, routes: [ { sni: [none.test], forward: %q } ] }\n", strict, plain)
	d := startStalled(t, yaml)

	long := "/" + strings.Repeat("x", 30_000) // a line of the log
	for _, v := range []struct {
		name, url string
		h2        bool
	}{
		{"HTTP/1.1", "http://" + web, false}, {"HTTP/1.1 over IPv6", "http://" + web6, false},
		{"HTTP/2 without TLS", "http://" + web, true}, {"HTTP/2 without TLS over IPv6", "http://" + web6, true},
		{"HTTP/1.1 with TLS", "https://" + secure, false}, {"HTTP/1.1 with TLS over IPv6", "https://" + secure6, false},
		{"HTTP/2 with TLS", "https://" + secure, true}, {"HTTP/2 with TLS over IPv6", "https://" + secure6, true},
	} {
		t.Run(v.name, func(t *testing.T) {
			protocols := new(http.Protocols)
			protocols.SetHTTP1(!v.h2)
			protocols.SetHTTP2(v.h2)
			protocols.SetUnencryptedHTTP2(v.h2)
			transport := &http.Transport{Protocols: protocols, TLSClientConfig: &tls.Config{RootCAs: selfsigned.Pool(c), ServerName: "app.test"}}
			defer transport.CloseIdleConnections()
			client := &http.Client{Timeout: time.Minute, Transport: transport}
			for i := range 300 {
				res, err := client.Get(v.url + long)
				if err != nil {
					t.Fatalf("request %d: %v", i+1, errors.Unwrap(err)) // without the URL
				}
				body, err := io.ReadAll(res.Body)
				res.Body.Close()
				if err != nil || string(body) != "hello" {
					t.Fatalf("request %d: %q, %v", i+1, body, err)
				}
			}
		})
	}
	first := hello(t)
	for _, name := range datapaths {
		t.Run("flows, "+name, func(t *testing.T) {
			for i := range 600 { // more than a source may have at a time
				c, err := net.Dial("tcp", edges[name])
				check(t, err)
				_, err = c.Write(first)
				check(t, err)
				check(t, c.SetReadDeadline(time.Now().Add(time.Minute)))
				if _, err := io.ReadFull(c, make([]byte, len(first))); err != nil {
					t.Fatalf("flow %d: %v", i+1, err)
				}
				c.Close()
			}
		})
	}
	t.Run("refused connections", func(t *testing.T) {
		for range 300 {
			c, err := net.Dial("tcp", strict)
			check(t, err)
			_, err = c.Write(first)
			check(t, err)
			check(t, c.SetReadDeadline(time.Now().Add(time.Minute)))
			if alert, err := io.ReadAll(c); err != nil || len(alert) == 0 {
				t.Fatalf("got %x, %v: want an alert", alert, err)
			}
			c.Close()
		}
	})
	if t.Failed() {
		return
	}
	for range 3 {
		if out, err := d.ask("reload"); err != nil {
			t.Fatalf("reload: %v: %s", err, out)
		}
	}
	before := d.status()
	check(t, d.cmd.Process.Signal(syscall.SIGHUP))
	wait(t, "HUP reloads", func() error {
		if !d.status().Loaded.After(before.Loaded) {
			return fmt.Errorf("still that of %v", before.Loaded)
		}
		return nil
	})
	if d.status().LogLost == 0 {
		t.Error("no line is lost: the test does not fill the queue")
	}

	// The reader is back.
	missing := make(chan int)
	var read strings.Builder
	go func() {
		defer close(missing)
		for lines := bufio.NewReaderSize(d.log, 1<<20); ; {
			line, err := lines.ReadString('\n')
			if err != nil {
				return
			}
			var e struct {
				Msg   string
				Lines int
			}
			if json.Unmarshal([]byte(line), &e) != nil {
				fmt.Fprintf(&read, "not JSON: %s", line)
			}
			if e.Lines > 0 {
				missing <- e.Lines
			}
			if e.Msg != "flow ended" {
				fmt.Fprintf(&read, "%s\n", e.Msg)
			}
		}
	}()
	select {
	case n := <-missing:
		if lost := d.status().LogLost; int64(n) != lost {
			t.Errorf("the log says that %d lines are missing, status %d", n, lost)
		}
	case <-time.After(time.Minute):
		t.Error("the log does not say that lines are missing")
	}
	d.ends()
	for range missing {
		t.Error("more lines are missing")
	}
	if text := read.String(); strings.Contains(text, "not JSON") || !strings.HasPrefix(text, "tailsplice runs") && !strings.Contains(text, "\ntailsplice runs") ||
		!strings.HasSuffix(text, "ended: all flows had finished\n") {
		t.Errorf("the log, but for flows:\n%s", text)
	}
}

// TestStalledLogAtTheEnd: the daemon ends though nobody reads its log, and does
// not end because who read it is gone.
func TestStalledLogAtTheEnd(t *testing.T) {
	at := freeaddr.Get(t)
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "hello") }))
	defer app.Close()
	yaml := fmt.Sprintf("listeners: [ { listen: [%q], mode: http, default: { forward: %q } } ]", at, app.Listener.Addr())
	url := "http://" + at
	get := func(t *testing.T, n int) {
		t.Helper()
		client := &http.Client{Timeout: time.Minute}
		for i := range n {
			res, err := client.Get(url)
			if err != nil {
				t.Fatalf("request %d: %v", i+1, err)
			}
			res.Body.Close()
		}
	}
	t.Run("stalled", func(t *testing.T) {
		d := startStalled(t, yaml)
		get(t, 200)
		d.ends()
	})
	t.Run("gone", func(t *testing.T) {
		d := startStalled(t, yaml)
		d.log.Close()
		get(t, 200)
		wait(t, "lines that nobody can read are counted", func() error {
			if d.status().LogLost == 0 {
				return errors.New("none is lost")
			}
			return nil
		})
		d.ends()
	})
}
