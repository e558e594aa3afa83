package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/cable"
	"github.com/tailsplice/tailsplice/test/selfsigned"
)

// How long strangers go on at a time, how often, with how many connections for each trick and address, and
// whether a good client's times count: see strangers_soak_test.go.
var (
	strangersGoOn   = time.Second
	strangersRounds = 1
	strangersConns  = 1
	strangersHeap   = 64 << 20 // bytes that may be left of it until the next collection
	strangersSoak   = false
)

// TestStrangers: four addresses with every trick that a stranger knows. A good client from another one is
// served all the while, and when they have gone so have their goroutines, their descriptors and their memory.
func TestStrangers(t *testing.T) {
	if !cable.InOwnNetwork(t) {
		return
	}
	w := startWorld(t)
	if _, err := w.good(time.Second); err != nil {
		t.Fatal(err)
	}
	before := w.uses()
	usual, worst := []time.Duration{}, []time.Duration{}
	var most usage
	began := map[string]int{}
	for range strangersRounds { // by turns, so that the machine's other business falls on both
		w.beside(w.polite, func() {
			p99, err := w.good(strangersGoOn)
			if err != nil {
				t.Errorf("beside polite clients: %v", err)
			}
			usual = append(usual, p99)
		})
		var mu sync.Mutex
		w.beside(func(ctx context.Context, source string) {
			attack(ctx, source, w.hello, strangersConns, func(trick string) { mu.Lock(); began[trick]++; mu.Unlock() })
		}, func() {
			p99, err := w.good(strangersGoOn)
			if err != nil {
				t.Errorf("beside strangers: %v", err)
			}
			worst = append(worst, p99)
			most = most.max(w.uses())
		})
	}
	for _, tr := range tricks(nil) {
		if began[tr.name] == 0 {
			t.Errorf("%s: never begun", tr.name)
		}
	}
	slices.Sort(usual)
	slices.Sort(worst)
	t.Logf("p99 of a good client beside polite ones %v, beside strangers %v; before %v, most %v; %v", usual, worst, before, most, began)
	if limit := 2*usual[len(usual)/2] + 5*time.Millisecond; strangersSoak && worst[len(worst)/2] > limit {
		t.Errorf("p99 of a good client: %v beside strangers, want at most %v", worst[len(worst)/2], limit)
	}
	for deadline := time.Now().Add(5 * time.Minute); ; time.Sleep(time.Second) {
		now := w.uses()
		if now.goroutines <= before.goroutines+20 && now.files <= before.files+2*64 && // the pipes that are kept
			now.heap <= before.heap+strangersHeap && now.sockets <= before.sockets+20 {
			t.Logf("afterwards %v", now)
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("not all has come back: before %v, now %v", before, now)
		}
	}
}

// world is a daemon, and what it leads to.
type world struct {
	t     *testing.T
	cmd   *exec.Cmd
	hello []byte
	tls   *tls.Config
}

func startWorld(t *testing.T) *world {
	dir := t.TempDir()
	cert := selfsigned.Certificate(t, "a.test")
	certPEM, keyPEM := selfsigned.PEM(t, cert)
	for name, data := range map[string][]byte{"cert.pem": certPEM, "key.pem": keyPEM} {
		check(t, os.WriteFile(filepath.Join(dir, name), data, 0o600))
	}
	echo := listen(t, "127.0.0.1:9001")
	go func() {
		for c, err := echo.Accept(); err == nil; c, err = echo.Accept() {
			go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
		}
	}()
	app := &http.Server{IdleTimeout: time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/big":
			_, _ = io.Copy(w, io.LimitReader(endless{}, 10<<20))
		case "/drain":
			_, _ = io.Copy(io.Discard, r.Body)
		case "/ws":
			c, buf, err := http.NewResponseController(w).Hijack()
			if err != nil {
				return
			}
			defer c.Close()
			_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
			_, _ = io.Copy(c, buf)
		default:
			_, _ = io.WriteString(w, "hello")
		}
	})}
	ln := listen(t, "127.0.0.1:9002")
	// What a target queues in its kernel is the target's to bound, and this one has its kernel with the daemon.
	raw, err := ln.(*net.TCPListener).SyscallConn()
	check(t, err)
	check(t, raw.Control(func(fd uintptr) { _ = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF, 128<<10) }))
	go func() { _ = app.Serve(ln) }()
	t.Cleanup(func() { app.Close() })
	files := fmt.Sprintf("{ files: { cert: %s/cert.pem, key: %s/key.pem } }", dir, dir)
	config := fmt.Sprintf(`
datapath: userspace
listeners:
  - { name: sni, listen: ["127.0.0.1:%d"], mode: sni, default: { forward: 127.0.0.1:9001 } }
  - { name: https, listen: ["127.0.0.1:%d"], mode: https, certificates: [ %s ], default: { forward: 127.0.0.1:9002 } }
  - name: mtls
    listen: ["127.0.0.1:%d"]
    mode: https
    certificates: [ %s ]
    default: { forward: 127.0.0.1:9002, client_certificates: { ca: %s/cert.pem } }
  - { name: http, listen: ["127.0.0.1:%d"], mode: http, default: { forward: 127.0.0.1:9002 } }
control: { socket: %s/control.sock, metrics: 127.0.0.1:9464 }
`, portSNI, portHTTPS, files, portMTLS, files, dir, portHTTP, dir)
	file := filepath.Join(dir, "strangers.yaml")
	check(t, os.WriteFile(file, []byte(config), 0o600))
	w := &world{t: t, hello: hello(t), cmd: exec.Command("tailsplice", "run", "--config", file, "--log-level", "warn"),
		tls: &tls.Config{RootCAs: selfsigned.Pool(cert), ServerName: "a.test"}}
	var log strings.Builder
	w.cmd.Stderr = &log
	w.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	check(t, w.cmd.Start())
	t.Cleanup(func() {
		_ = w.cmd.Process.Kill()
		_ = w.cmd.Wait()
		if strings.Contains(log.String(), "panic") || t.Failed() {
			t.Errorf("the daemon's log:\n%s", log.String()[:min(log.Len(), 20_000)])
		}
	})
	wait(t, "the daemon listens", func() error {
		for _, port := range []int{portSNI, portHTTPS, portMTLS, portHTTP, 9464} {
			c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
			if err != nil {
				return err
			}
			c.Close()
		}
		return nil
	})
	return w
}

// beside has four addresses do something while then runs.
func (w *world) beside(do func(ctx context.Context, source string), then func()) {
	ctx, cancel := context.WithCancel(w.t.Context())
	var all sync.WaitGroup
	for i := range 4 {
		all.Go(func() { do(ctx, fmt.Sprintf("127.0.0.%d", 2+i)) })
	}
	time.Sleep(strangersGoOn / 4) // until they are at it
	then()
	cancel()
	all.Wait()
}

// polite clients keep some connections, and ask for something twenty times a second.
func (w *world) polite(ctx context.Context, source string) {
	var all sync.WaitGroup
	for range 10 {
		c := w.client(source)
		defer c.CloseIdleConnections()
		all.Go(func() {
			for ctx.Err() == nil {
				if res, err := c.Get(fmt.Sprintf("https://127.0.0.1:%d/", portHTTPS)); err == nil {
					_, _ = io.Copy(io.Discard, res.Body)
					res.Body.Close()
				}
				time.Sleep(50 * time.Millisecond)
			}
		})
	}
	all.Wait()
}

func (w *world) client(source string) *http.Client {
	d := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
	return &http.Client{Timeout: time.Minute, Transport: &http.Transport{DialContext: d.DialContext, TLSClientConfig: w.tls.Clone(), ForceAttemptHTTP2: true}}
}

// good is a client that does a bit of everything, for so long at least: the 99th of a hundred times.
func (w *world) good(long time.Duration) (p99 time.Duration, err error) {
	const source = "127.0.0.9"
	kept := w.client(source)
	defer kept.CloseIdleConnections()
	get := func(c *http.Client, url string) error {
		res, err := c.Get(url)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if b, err := io.ReadAll(res.Body); err != nil || string(b) != "hello" {
			return fmt.Errorf("%s: %d %q, %w", url, res.StatusCode, b, err)
		}
		return nil
	}
	one := []func() error{
		func() error { return get(kept, fmt.Sprintf("https://127.0.0.1:%d/", portHTTPS)) },
		func() error {
			fresh := w.client(source)
			defer fresh.CloseIdleConnections()
			return get(fresh, fmt.Sprintf("http://127.0.0.1:%d/", portHTTP))
		},
		func() error {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}, Timeout: time.Minute}
			c, err := d.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", portSNI))
			if err != nil {
				return err
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(time.Minute))
			if _, err := c.Write(w.hello); err != nil {
				return err
			}
			_, err = io.ReadFull(c, make([]byte, len(w.hello)))
			return err
		},
	}
	var times []time.Duration
	for end := time.Now().Add(long); time.Now().Before(end) || len(times) < 9; time.Sleep(2 * time.Millisecond) {
		began := time.Now()
		if err := one[len(times)%len(one)](); err != nil {
			return 0, fmt.Errorf("after %d times: %w", len(times), err)
		}
		times = append(times, time.Since(began))
	}
	slices.Sort(times)
	return times[len(times)*99/100], nil
}

// usage is what the daemon uses, and how many sockets there are on both sides of it.
type usage struct{ rss, heap, goroutines, files, sockets int }

func (u usage) String() string {
	return fmt.Sprintf("%d MiB RSS, %d MiB heap, %d goroutines, %d descriptors, %d sockets", u.rss>>20, u.heap>>20, u.goroutines, u.files, u.sockets)
}

func (u usage) max(v usage) usage {
	return usage{max(u.rss, v.rss), max(u.heap, v.heap), max(u.goroutines, v.goroutines), max(u.files, v.files), max(u.sockets, v.sockets)}
}

func (w *world) uses() usage {
	w.t.Helper()
	res, err := http.Get("http://127.0.0.1:9464/metrics")
	check(w.t, err)
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	check(w.t, err)
	value := func(name string) int {
		m := regexp.MustCompile(`(?m)^` + name + ` (\S+)$`).FindSubmatch(text)
		if m == nil {
			w.t.Fatalf("no metric %s", name)
		}
		v, err := strconv.ParseFloat(string(m[1]), 64)
		check(w.t, err)
		return int(v)
	}
	table, err := os.ReadFile("/proc/self/net/tcp")
	check(w.t, err)
	sockets := 0
	for line := range strings.Lines(string(table)) {
		if f := strings.Fields(line); f[3] != "06" { // TIME_WAIT, which holds next to nothing
			sockets++
		}
	}
	return usage{value("process_resident_memory_bytes"), value("go_memstats_heap_inuse_bytes"), value("go_goroutines"), value("process_open_fds"), sockets}
}
