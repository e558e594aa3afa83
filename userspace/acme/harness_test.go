package acme

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/freeaddr"
	"github.com/tailsplice/tailsplice/test/logs"
	"github.com/tailsplice/tailsplice/userspace/acme/acmetest"
)

// TestMain makes this binary its own dns hook: "dns-hook URL present FQDN VALUE".
func TestMain(m *testing.M) {
	if len(os.Args) == 6 && os.Args[1] == "dns-hook" {
		path, rec := "/set-txt", map[string]string{"host": os.Args[4], "value": os.Args[5]}
		if os.Args[3] == "cleanup" {
			path = "/clear-txt"
		}
		b, _ := json.Marshal(rec)
		res, err := http.Post(os.Args[2]+path, "application/json", bytes.NewReader(b))
		if err != nil || res.StatusCode != 200 {
			fmt.Println(res, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// authority is a running pebble.
type authority struct {
	acmetest.Config
	t    testing.TB
	dir  string
	root string // file
	args []string
	bin  string
	cmd  *exec.Cmd
	log  *logs.Log
}

// host is where an authority's questions go: the ports of a host that terminates
// TLS and speaks HTTP, as server's listeners do.
type host struct {
	t         testing.TB
	m         *Manager
	log       *logs.Log
	http, tls net.Listener
	mu        sync.Mutex
	sources   []*Source
}

// freePort is one of 127.0.0.1 that nothing listens on.
func freePort(t testing.TB) int { return freeaddr.Ports(t, "127.0.0.1", 1) }

var programs = sync.OnceValues(func() (acmetest.Programs, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	return acmetest.Build(ctx, func(format string, a ...any) { fmt.Fprintf(os.Stderr, "acme: "+format+"\n", a...) })
})

func build(t testing.TB) acmetest.Programs {
	t.Helper()
	p, err := programs()
	if err != nil && os.Getenv("CI") != "true" {
		t.Skipf("pebble can't be built: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// run starts a program that ends with the test, and waits until addr accepts.
func run(t testing.TB, log io.Writer, addr, bin string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(bin, args...)
	cmd.Env = append(os.Environ(), acmetest.Env...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { cmd.Wait(); close(done) }()
	t.Cleanup(func() { cmd.Process.Kill(); <-done })
	accepts(t, bin, addr)
	return cmd
}

// accepts waits until connections are accepted at addr, by what.
func accepts(t testing.TB, what, addr string) {
	t.Helper()
	eventually(t, what+" accepts at "+addr, func() error {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err
	})
}

// nameServer starts a DNS server that answers with 127.0.0.1, or with nothing.
// It returns its address and its management's URL.
func nameServer(t testing.TB, ip4 string) (addr, management string) {
	p := build(t)
	addr, manage := freeaddr.Get(t), freeaddr.Get(t)
	log := &logs.Log{}
	run(t, log, manage, p.DNS, acmetest.DNSArgs(addr, manage, ip4, "")...)
	return addr, "http://" + manage
}

// newAuthority starts a pebble that asks h's ports.
func newAuthority(t testing.TB, h *host, c acmetest.Config) *authority {
	t.Helper()
	p := build(t)
	if c.Validity == 0 {
		c.Validity = time.Hour
	}
	if c.DNS == "" {
		c.DNS, _ = nameServer(t, "127.0.0.1")
	}
	c.Host, c.Port = "127.0.0.1", freeaddr.Ports(t, "127.0.0.1", 2)
	if c.HTTPPort == 0 {
		c.HTTPPort = h.http.Addr().(*net.TCPAddr).Port
	}
	if c.TLSPort == 0 {
		c.TLSPort = h.tls.Addr().(*net.TCPAddr).Port
	}
	a := &authority{Config: c, t: t, dir: t.TempDir(), bin: p.Pebble, log: &logs.Log{}}
	var err error
	if a.args, a.root, err = c.Write(a.dir); err != nil {
		t.Fatal(err)
	}
	a.start()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("pebble:\n%s", last(a.log))
		}
	})
	return a
}

func (a *authority) start() {
	a.t.Helper()
	a.cmd = run(a.t, a.log, fmt.Sprintf("127.0.0.1:%d", a.Port), a.bin, a.args...)
	accepts(a.t, "its management", fmt.Sprintf("127.0.0.1:%d", a.Port+1))
}

// stop kills it, and returns when nothing listens any more.
func (a *authority) stop() {
	a.t.Helper()
	a.cmd.Process.Kill()
	eventually(a.t, "its end", func() error {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", a.Port))
		if err != nil {
			return nil
		}
		c.Close()
		return errors.New("it still accepts")
	})
}

// issued counts the certificates that it has issued.
func (a *authority) issued() int { return strings.Count(a.log.String(), "Issued certificate serial") }

// pool has the root that it issues from now.
func (a *authority) pool() *x509.CertPool {
	a.t.Helper()
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	res, err := c.Get(a.Roots())
	if err != nil {
		a.t.Fatal(err)
	}
	defer res.Body.Close()
	b, _ := io.ReadAll(res.Body)
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		a.t.Fatalf("no root: %s", b)
	}
	return pool
}

func (a *authority) ca() CA { return CA{Directory: a.Directory(), RootFile: a.root} }

func newHost(t testing.TB) *host {
	t.Helper()
	h := &host{t: t, log: &logs.Log{}}
	h.m = New(slog.New(slog.NewTextHandler(h.log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	listen := func() net.Listener {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		return ln
	}
	h.http, h.tls = listen(), listen()
	go http.Serve(h.http, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !h.manager().ServeChallenge(w, r) {
			http.Error(w, "not a challenge", http.StatusNotFound)
		}
	}))
	cfg := &tls.Config{NextProtos: []string{"http/1.1"}, GetCertificate: h.certificate,
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) { return h.manager().ChallengeConfig(hello), nil }}
	go func() {
		for {
			c, err := h.tls.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(patience))
				tc := tls.Server(c, cfg)
				if tc.Handshake() == nil {
					io.WriteString(tc, "hello")
					tc.CloseWrite()
					io.Copy(io.Discard, tc)
				}
			}()
		}
	}()
	t.Cleanup(func() {
		h.manager().Close()
		if t.Failed() {
			t.Logf("log:\n%s", last(h.log))
		}
	})
	return h
}

func (h *host) certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	h.mu.Lock()
	sources := h.sources
	h.mu.Unlock()
	for _, s := range sources {
		if c, err := s.GetCertificate(hello); c != nil || err != nil {
			return c, err
		}
	}
	return nil, errors.New("no such name")
}

// manager is the one behind the ports now.
func (h *host) manager() *Manager {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.m
}

// restart replaces the manager, as a restart of the daemon does.
func (h *host) restart() {
	h.m.Close()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.m = New(slog.New(slog.NewTextHandler(h.log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	h.sources = nil
}

// apply brings sections into force.
func (h *host) apply(sections ...Section) {
	h.t.Helper()
	apply, err := h.m.Prepare(sections)
	if err != nil {
		h.t.Fatal(err)
	}
	apply()
	var sources []*Source
	for _, s := range sections {
		sources = append(sources, h.m.Source(s))
	}
	h.mu.Lock()
	h.sources = sources
	h.mu.Unlock()
}

// get makes a handshake for name, and returns the certificate.
func (h *host) get(name string, roots *x509.CertPool) (*x509.Certificate, error) {
	d := &net.Dialer{Timeout: patience}
	c, err := tls.DialWithDialer(d, "tcp", h.tls.Addr().String(), &tls.Config{ServerName: name, RootCAs: roots, InsecureSkipVerify: roots == nil})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if _, err := io.ReadAll(c); err != nil {
		return nil, err
	}
	return c.ConnectionState().PeerCertificates[0], nil
}

// wait waits until name is served with a certificate that roots believe.
func (h *host) wait(name string, roots *x509.CertPool) *x509.Certificate {
	h.t.Helper()
	var cert *x509.Certificate
	eventually(h.t, "a certificate for "+name, func() (err error) { cert, err = h.get(name, roots); return })
	return cert
}

func (h *host) status(name string) Status {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, s := range h.sources {
		for _, st := range s.Status() {
			if st.Name == name {
				return st
			}
		}
	}
	return Status{}
}

// patience is for what comes sooner or later, on a machine that is busy too.
const patience = 2 * time.Minute

func eventually(t testing.TB, what string, ok func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if err = ok(); err == nil {
			return
		}
	}
	t.Fatalf("%s: not within %v: %v", what, patience, err)
}

func contains(s string, parts ...string) error {
	for _, p := range parts {
		if !strings.Contains(s, p) {
			return fmt.Errorf("%q is not in %q", p, s)
		}
	}
	return nil
}

// last is the end of a log, without what is only good for debugging.
func last(l *logs.Log) string {
	var lines []string
	for line := range strings.Lines(l.String()) {
		if !strings.Contains(line, "level=DEBUG") {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-15):], "")
}

func storageDir(t testing.TB) string { return filepath.Join(t.TempDir(), "acme") }
