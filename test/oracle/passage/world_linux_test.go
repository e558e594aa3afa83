package passage

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/freeaddr"
	"github.com/tailsplice/tailsplice/test/oracle"
	"github.com/tailsplice/tailsplice/test/selfsigned"
)

// startDaemon starts the daemon that TAILSPLICE_BINARY names, or this source's, with n passages.
func startDaemon(t testing.TB, n int) (all []*passage) {
	dir := t.TempDir()
	cert, key := selfsigned.PEM(t, selfsigned.Certificate(t, "a.test"))
	var b strings.Builder
	b.WriteString("listeners:\n")
	for i := range n {
		p := newPassage(t)
		all = append(all, p)
		for _, isTLS := range []bool{false, true} {
			addr, mode := freeaddr.Get(t), "mode: http"
			p.doors[oracle.Wire{TLS: isTLS}], p.doors[oracle.Wire{TLS: isTLS, HTTP2: true}] = addr, addr
			if isTLS {
				mode = fmt.Sprintf("mode: https, certificates: [ { files: { cert: %q, key: %q } } ]",
					write(t, dir, "cert.pem", cert), write(t, dir, "key.pem", key))
			}
			fmt.Fprintf(&b, "  - { name: l%d-%v, listen: [%q], %s, default: { forward: %q } }\n", i, isTLS,
				addr, mode, p.target.addr)
		}
	}
	fmt.Fprintf(&b, "control: { socket: %q }\n", filepath.Join(dir, "control.sock"))
	bin := os.Getenv("TAILSPLICE_BINARY")
	if bin == "" {
		bin = filepath.Join(dir, "tailsplice")
		if out, err := exec.Command("go", "build", "-o", bin,
			"github.com/tailsplice/tailsplice/cmd/tailsplice").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	run(t, []string{"TS_SOCKET=/nonexistent"}, all, bin, "run", "--config", write(t, dir, "tailsplice.yaml",
		[]byte(b.String())), "--log-level", "error")
	return all
}

func newPassage(t testing.TB) *passage {
	return &passage{doors: map[oracle.Wire]string{}, target: startTarget(t),
		conns: map[oracle.Wire]*oracle.Conn{}}
}

// startNginx starts nginx with n passages, without TLS.
func startNginx(t testing.TB, n int) (all []*passage) {
	bin, err := exec.LookPath("nginx")
	if err != nil {
		bin, err = exec.LookPath("/usr/sbin/nginx")
	}
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("this machine lacks nginx, which CI must have")
		}
		t.Skip("this machine lacks nginx")
	}
	dir := t.TempDir()
	var b strings.Builder
	fmt.Fprintf(&b, `daemon off; master_process off; pid %[1]s/pid; error_log %[1]s/error.log crit; user root;
events { worker_connections 1024; }
http {
	access_log off; underscores_in_headers on; ignore_invalid_headers off; client_max_body_size 0;
	merge_slashes off;
	large_client_header_buffers 8 64k; http2_max_requests 1000000; client_body_temp_path %[1]s;
	proxy_temp_path %[1]s;
	fastcgi_temp_path %[1]s; uwsgi_temp_path %[1]s; scgi_temp_path %[1]s;
	proxy_http_version 1.1; proxy_buffering off; proxy_request_buffering off;
	proxy_set_header Host $http_host; proxy_set_header Connection "";
`, dir)
	for range n {
		p := newPassage(t)
		all = append(all, p)
		for wire, protocol := range map[oracle.Wire]string{{}: "", {HTTP2: true}: "http2"} {
			p.doors[wire] = freeaddr.Get(t)
			fmt.Fprintf(&b, "\tserver { listen %s %s; location / { proxy_pass http://%s; } }\n",
				p.doors[wire], protocol, p.target.addr)
		}
	}
	b.WriteString("}\n")
	run(t, nil, all, bin, "-p", dir, "-c", write(t, dir, "nginx.conf", []byte(b.String())), "-e",
		filepath.Join(dir, "error.log"))
	return all
}

// run runs a command until the test ends, and returns once it listens.
func run(t testing.TB, env []string, all []*passage, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	said := &buffer{}
	cmd.Env, cmd.Stdout, cmd.Stderr = append(os.Environ(), env...), said, said
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
		if s := said.String(); strings.Contains(s, "panic") {
			t.Errorf("%s: %.4000s", filepath.Base(name), s)
		}
	})
	for _, p := range all {
		for _, addr := range p.doors {
			for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
				c, err := net.Dial("tcp", addr)
				if err == nil {
					c.Close()
					break
				}
				if time.Now().After(end) {
					t.Fatalf("%s does not listen: %v: %s", name, err, said.String())
				}
			}
		}
	}
}

type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func write(t testing.TB, dir, name string, text []byte) string {
	file := filepath.Join(dir, name)
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
