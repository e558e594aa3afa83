package oracle

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/tailsplice/tailsplice/test/freeaddr"
	"github.com/tailsplice/tailsplice/test/selfsigned"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
	"github.com/tailsplice/tailsplice/userspace/server"
)

// quiet is where servers log what clients do wrong.
var quiet = log.New(io.Discard, "", 0)

// A world is a daemon with a listener for each target, in front of which it guards hosts and paths.
type world struct {
	word      string // which only targets know
	listeners []listener

	mu     sync.Mutex
	run    func() *process // starts the daemon
	daemon *process
	read   int // of what it wrote
}

type listener struct {
	name, addr string
	tls        bool
}

// grammar is of what means something in a world.
func grammar(t testing.TB) *Grammar {
	seeds, err := AllSeeds()
	if err != nil {
		t.Fatal(err)
	}
	g := &Grammar{Hosts: []string{"open.test", "open.test"}, Paths: []string{"/", "/open", "/told",
		"/told/x", "/app", "/app/private", "/sub", "/private"},
		Names: append([]string{"Host", "X-Original-Url", "X-Rewrite-Url", "X-Forwarded-Uri",
			"X-Http-Method-Override", "Authorization"}, identities...),
		Values: []string{forged, forged, forged + ", " + forged}, Seeds: seeds}
	for _, kind := range hosts {
		g.Hosts = append(g.Hosts, kind+".test")
	}
	for _, kind := range kinds {
		g.Paths = append(g.Paths, "/"+kind, "/"+kind+"/x")
	}
	return g
}

// newWorld starts everything. inside is for a daemon within this process, whose code a fuzzer can watch.
func newWorld(t testing.TB, inside bool) *world {
	dir, err := os.MkdirTemp("", "oracle") // a socket's name must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{word: fmt.Sprintf("guarded%016x", rand.Uint64())}
	targets := startTargets(t, dir, w.word)

	no := authServer(t, func(w http.ResponseWriter,
		r *http.Request) {
		w.WriteHeader(http.StatusUnauthorized)
	})
	told := authServer(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Told", r.Header.Get("X-Forwarded-Host")+" "+r.Header.Get("X-Forwarded-Uri"))
	})
	policy := authServer(t, func(w http.ResponseWriter, r *http.Request) {
		if host, _, _ := strings.Cut(r.Header.Get("X-Forwarded-Host"), ":"); host == "policy.test" {
			w.WriteHeader(http.StatusForbidden)
		}
	})
	hash, err := bcrypt.GenerateFromPassword([]byte("right"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	names := []string{"open.test", "*.test"}
	cert, key := selfsigned.PEM(t, selfsigned.Certificate(t, names...))
	ca, _ := selfsigned.PEM(t, selfsigned.Certificate(t, "client"))
	certFile, keyFile := write(t, filepath.Join(dir, "cert.pem"), string(cert)), write(t, filepath.Join(dir,
		"key.pem"), string(key))
	guards := map[string]string{"allow": "allow: [192.0.2.1]",
		"basic":   fmt.Sprintf("basic_auth: { users: { me: %q } }", hash),
		"forward": fmt.Sprintf("forward_auth: { address: %q }", no), "cert": "allow: [192.0.2.1]"}

	const notTold = "remove: [X-Told]"
	var b strings.Builder
	b.WriteString("limits: { connections_per_source: 4096 }\nlisteners:\n")
	for _, isTLS := range []bool{false, true} {
		mode := "http"
		if isTLS {
			mode = fmt.Sprintf("https\n    certificates: [ { files: { cert: %q, key: %q } } ]", certFile,
				keyFile)
			guards["cert"] = fmt.Sprintf("client_certificates: { ca: %q }", write(t, filepath.Join(dir,
				"ca.pem"), string(ca)))
		}
		for _, target := range targets {
			l := listener{target.name, freeaddr.Get(t), isTLS}
			w.listeners = append(w.listeners, l)
			fmt.Fprintf(&b, "  - name: %s-%v\n    listen: [%q]\n    mode: %s\n    routes:\n", l.name, l.tls,
				l.addr, mode)
			forward := fmt.Sprintf("forward: %q", "unix://"+target.socket)
			if target.h2c {
				forward += ", upstream: { protocol: h2c }"
			}
			route := func(match, more string) {
				if !strings.Contains(more, "X-Told") { // which only the auth server says
					more += ", request_headers: { " + notTold + " }"
				}
				fmt.Fprintf(&b, "      - { %s, %s%s }\n", match, forward, more)
			}
			for _, kind := range kinds {
				route("host: "+kind+".test", ", "+guards[kind])
				route("host: open.test, path: /"+kind, ", "+guards[kind])
			}
			route("host: open.test, path: /told",
				fmt.Sprintf(", forward_auth: { address: %q, copy_headers: [X-Told] }", told))
			route("host: open.test, path: /app/private", ", "+guards["allow"])
			route("host: [policy.test, other.test]", fmt.Sprintf(", forward_auth: { address: %q }", policy))
			route("host: open.test, path: /app",
				", strip_prefix: true, request_headers: { set: { Host: stripped.test }, "+notTold+" }")
			route("host: open.test, path: /sub",
				", add_prefix: /below, request_headers: { set: { Host: below.test }, "+notTold+" }")
			route("host: open.test", "")
			fmt.Fprintf(&b, "    default: { %s, request_headers: { %s } }\n", forward, notTold)
		}
	}
	// Whoever may label containers wants all that is guarded, be it by the https listener alone.
	for _, isTLS := range []bool{true, false} {
		l := listener{"labels", freeaddr.Get(t), isTLS}
		w.listeners = append(w.listeners, l)
		mode, guarded := "mode: http", kinds[:2]
		if isTLS {
			mode = fmt.Sprintf("mode: https\n    certificates: [ { files: { cert: %q, key: %q } } ]",
				certFile, keyFile)
			guarded = kinds
		}
		fmt.Fprintf(&b, "  - name: labels-%v\n    listen: [%q]\n    docker: { enabled: true }\n    %s\n    routes:\n", l.tls, l.addr, mode)
		for _, kind := range guarded {
			fmt.Fprintf(&b, "      - { host: %s.test, forward: %q, %s, request_headers: { remove: [X-Told] } }\n", kind,
				"unix://"+targets[0].socket, guards[kind])
			fmt.Fprintf(&b, "      - { host: open.test, path: /%s, forward: %q, %s, request_headers: { remove: [X-Told] } }\n", kind,
				"unix://"+targets[0].socket, guards[kind])
		}
	}
	labels := startLabels(t, filepath.Join(dir, "docker.sock"), targets[0])
	file := write(t, filepath.Join(dir, "tailsplice.yaml"),
		b.String()+fmt.Sprintf("control: { socket: %q }\n", filepath.Join(dir, "control.sock")))
	if inside {
		w.runInside(t, file, labels)
		return w
	}
	env := []string{"DOCKER_HOST=unix://" + labels, "TS_SOCKET=/nonexistent"}
	w.run = func() *process {
		p := command(t, env, daemon(t), "run", "--config", file, "--log-level", "error")
		for _, l := range w.listeners {
			waitFor(t, "the daemon", l.reachable)
		}
		return p
	}
	w.daemon = w.run()
	return w
}

// runInside starts a daemon within this process.
func (w *world) runInside(t testing.TB, file, labels string) {
	w.daemon = &process{}
	cfg, err := config.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	os.Setenv("DOCKER_HOST", "unix://"+labels)
	os.Setenv("TS_SOCKET", "/nonexistent")
	o := server.Options{Version: "test",
		Log: slog.New(slog.NewTextHandler(w.daemon, &slog.HandlerOptions{Level: slog.LevelError}))}
	o.Loops, o.Relay = relaytest.Relay()
	f, err := server.New(cfg, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
}

func (l listener) reachable() error {
	c, err := net.Dial("tcp", l.addr)
	if err == nil {
		c.Close()
	}
	return err
}

// again looks whether the daemon lives, and starts it again if not.
func (w *world) again(t testing.TB) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.listeners[0].reachable() == nil {
		return
	}
	t.Errorf("the daemon has ended: %.2000s", w.daemon.said(w.read))
	w.daemon, w.read = w.run(), 0
}

// panics is what the daemon's log has of panics, that nobody was told yet.
func (w *world) panics() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	said := w.daemon.said(w.read)
	w.read += len(said)
	i := strings.Index(said, "panic")
	if i < 0 {
		return ""
	}
	return said[i:]
}

// daemon is the daemon's binary: the one that TAILSPLICE_BINARY names, else this source's.
func daemon(t testing.TB) string {
	t.Helper()
	if bin := os.Getenv("TAILSPLICE_BINARY"); bin != "" {
		return bin
	}
	bin, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

// build builds the daemon once for all tests. TestMain removes it.
var build = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "oracle-daemon")
	if err != nil {
		return "", err
	}
	built = dir
	bin := filepath.Join(dir, "tailsplice")
	out, err := exec.Command("go", "build", "-o", bin,
		"github.com/tailsplice/tailsplice/cmd/tailsplice").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return bin, nil
})

var built string // the folder of the daemon, "" for none

func TestMain(m *testing.M) {
	code := m.Run()
	if built != "" {
		os.RemoveAll(built)
	}
	os.Exit(code)
}

func authServer(t testing.TB, h http.HandlerFunc) string {
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return srv.URL + "/"
}

// startLabels starts a docker daemon whose containers claim what is guarded, and the server that they are.
func startLabels(t testing.TB, socket string, is target) string {
	// The container has a port and an address; the server, a socket.
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serveEach(t, ln, func(c net.Conn) {
		up, err := net.Dial("unix", is.socket)
		if err != nil {
			return
		}
		defer up.Close()
		go io.Copy(up, c)
		io.Copy(c, up)
	})
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	type labels map[string]string
	var list []map[string]any
	claim := func(l labels) {
		n := len(list) + 1
		l["tailsplice.port"] = port
		list = append(list, map[string]any{"Id": fmt.Sprintf("%064x", n),
			"Names": []string{fmt.Sprintf("/rogue-%d", n)}, "State": "running", "Labels": l,
			"NetworkSettings": map[string]any{"Networks": map[string]any{"bridge": map[string]any{"IPAddress": "127.0.0.1"}}}})
	}
	claim(labels{"tailsplice.host": "*.test"})
	claim(labels{"tailsplice.host": "open.test"})
	claim(labels{"tailsplice.host": "open.test", "tailsplice.path": "/"})
	for _, kind := range kinds {
		for _, host := range []string{kind + ".test", "open.test", "x." + kind + ".test"} {
			for _, p := range []string{"", "/" + kind, "/" + kind + "/x", "/x", "/%2e/" + kind} {
				l := labels{"tailsplice.host": host}
				if p != "" {
					l["tailsplice.path"] = p
				}
				claim(l)
			}
		}
	}
	text, err := json.Marshal(list)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, socket, &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.41")
		w.Header().Set("Content-Type", "application/json")
		switch {
		case r.URL.Path == "/_ping":
		case strings.HasSuffix(r.URL.Path, "/containers/json"):
			w.Write(text)
		case strings.HasSuffix(r.URL.Path, "/events"):
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		case strings.HasSuffix(r.URL.Path, "/json"):
			io.WriteString(w, `{"Config":{}}`)
		default:
			io.WriteString(w, `{}`)
		}
	})})
	return socket
}

// A door is a way to speak to a world: connections by one door are the same.
type door struct {
	listener
	http2 bool
	sni   string
	leave bool // the client has the right password of basic_auth
}

func (d door) String() string {
	return fmt.Sprintf("%s %s sni=%q leave=%v", d.name, Wire{d.http2, d.tls}, d.sni, d.leave)
}

// anyDoor chooses one.
func (w *world) anyDoor(c *Choices, g *Grammar) door {
	d := door{listener: Pick(c, w.listeners...), http2: c.Percent(50)}
	if d.tls {
		d.sni = Pick(c, "", g.host(c))
	}
	d.leave = c.Percent(10)
	return d
}

func (d door) dial() (*Conn, error) {
	c, err := Dial(d.addr, Wire{d.http2, d.tls}, &tls.Config{InsecureSkipVerify: true, ServerName: d.sni})
	if err == nil {
		c.Nudge, c.Patience = 200*time.Millisecond, 2*time.Second
	}
	return c, err
}

// send sends a message and says what the answers have that they must not.
func (w *world) send(c *Conn, d door, m *Message) (wrong string, a Answer) {
	if d.leave {
		withLeave := *m
		withLeave.Fields = append([]Field{{"Authorization", "Basic bWU6cmlnaHQ="}}, m.Fields...)
		m = &withLeave
	}
	a = c.Do(m)
	rest := c.Seen
	for {
		_, after, ok := bytes.Cut(rest, []byte(w.word+":"))
		if !ok {
			return "", a
		}
		rest = after
		kind := string(after[:bytes.IndexFunc(append(bytes.Clone(after), ' '),
			func(r rune) bool { return r < 'a' || r > 'z' })])
		if !d.leave || kind != "basic" {
			return kind, a
		}
	}
}

// user sends messages one after the other, over connections that are kept.
type user struct {
	world *world
	conns map[door]*Conn
	sent  int
	taken int // were answered by a target, 200
}

func (u *user) send(d door, m *Message) (wrong string, a Answer, err error) {
	c := u.conns[d]
	if c == nil || !c.Usable() {
		if c != nil {
			c.Close()
		}
		delete(u.conns, d)
		if c, err = d.dial(); err != nil {
			return "", a, err
		}
		u.conns[d] = c
	}
	wrong, a = u.world.send(c, d, m)
	u.sent++
	if a.Status == 200 {
		u.taken++
	}
	if wrong != "" {
		c.broken = true
	}
	return wrong, a, nil
}

func (u *user) close() {
	for _, c := range u.conns {
		c.Close()
	}
}
