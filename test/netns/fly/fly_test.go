package fly

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/build"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

const (
	image    = "tailsplice-lab/fly"
	authKey  = "tskey-auth-lab" // no node joins without
	patience = time.Minute
	tun      = "/dev/net/tun"
)

// homeConfig answers with the request's headers.
var homeConfig = strings.Replace(lab.HomeConfig, "tailnet://laptop:8080", "127.0.0.1:9100", 1)

func TestEdge(t *testing.T) {
	lab.Require(t, lab.Options{}, "haproxy", "make", "docker")
	w := lab.Start(t, lab.Options{})
	w.Tailnet.Control.RequireAuthKey = authKey
	if w.Docker == nil {
		t.Fatal("no dockerd")
	}
	if err := w.Home.InstallCertificate(); err != nil {
		t.Fatal(err)
	}
	ln, err := w.Home.Listen("tcp", "127.0.0.1:9100")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		json.NewEncoder(w).Encode(r.Header)
	})}
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
	w.Home.Tailsplice(t, homeConfig)

	e := &edge{World: w, region: "waw", drain: 301 * time.Second, login: w.Tailnet.Control.ExplicitBaseURL,
		env: []string{"TS_AUTHKEY=" + authKey}}
	e.build(t)
	remove, err := w.Docker.Network(t.Context(), "fly", netip.MustParsePrefix("172.19.0.0/16"),
		netip.MustParsePrefix("fdaa:0:1::/64"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := remove(); err != nil {
			t.Error(err)
		}
	})
	e.start(t)
	e.says(t, "warning: DRAIN_TIMEOUT is 5m1s")
	e.proxy(t)

	for name, port := range map[string]int{"private IPv4": 4, "private IPv6": 6} {
		t.Run(name, func(t *testing.T) { e.page(t, e.browser(t, port)) })
	}
	t.Run("step 10", func(t *testing.T) {
		command := regexp.MustCompile(`fly ssh console -C "(.*)"`).FindStringSubmatch(block(t, "docs/fly.md", "fly ssh"))
		if command == nil {
			t.Fatal("docs/fly.md does not ask the edge by fly ssh console")
		}
		if out := e.exec(t, strings.Fields(command[1])...); !strings.Contains(out, "edge-waw") {
			t.Errorf("the node is not named by its region:\n%s", out)
		}
	})
	t.Run("home is out of reach", func(t *testing.T) {
		w.Home.Node.Stop()
		t.Cleanup(func() {
			if err := w.Home.Node.Start(); err != nil {
				t.Fatal(err)
			}
			e.page(t, e.browser(t, 4))
		})
		for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
			c, err := w.Laptop.Dial(t.Context(), "tcp", net.JoinHostPort(e.ip4, "443"))
			if errors.Is(err, syscall.ECONNREFUSED) {
				return
			}
			if err == nil {
				c.Close()
			}
			if time.Now().After(deadline) {
				t.Fatalf("its port is still open: %v", err)
			}
		}
	})
	t.Run("a node of the tailnet is not believed", func(t *testing.T) {
		c, err := w.Home.Dial(t.Context(), "tcp", net.JoinHostPort(e.node(t), "443"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fmt.Fprintf(c, "PROXY TCP4 192.0.2.1 192.0.2.2 1 443\r\n")
		e.says(t, "proxy_from_stranger")
	})
	t.Run("tailsplice dies", func(t *testing.T) {
		pid := e.killProgram(t, "/usr/bin/tailsplice")
		b := e.browser(t, 4)
		e.page(t, b) // the connection waits for the next process
		b.CloseIdleConnections()
		if now := e.program(t, "/usr/bin/tailsplice"); now == pid {
			t.Error("it is still the same process")
		}
		e.says(t, "has left its sockets")
	})
	t.Run("image of make packages", func(t *testing.T) { packagedImage(t, w) })
	t.Run("new version beside another machine", func(t *testing.T) { newVersion(t, e) })
	t.Run("drain", func(t *testing.T) {
		b := e.browser(t, 4)
		e.page(t, b) // keeps its connection
		e.kill(t, "SIGINT")
		e.says(t, `"draining`)
		e.kill(t, "SIGTERM")
		e.says(t, `"still draining`)
		before := e.connections
		e.page(t, b)
		if e.connections != before {
			t.Error("the connection was cut, and another one made")
		}
		b.CloseIdleConnections()
		if code := e.wait(t); code != 0 {
			t.Errorf("it ended with status %d, want 0", code)
		}
	})
	t.Run("tailscaled dies", func(t *testing.T) {
		e.ip4 = ""
		e.start(t)
		e.killProgram(t, "/usr/bin/tailscaled")
		if code := e.wait(t); code != 1 {
			t.Errorf("it ended with status %d, want 1, so that the machine is started anew", code)
		}
		e.says(t, "tailscaled ended")
	})
}

// newVersion replaces a machine beside one that stays, while connections come: each of them gets its page. Flows
// of the machine that stays go on, and those of the other one until they or its drain end.
//
// The first machine joins by what fly.io says of it, and the next one by an OAuth client: stand-ins for both APIs
// give them the key.
func newVersion(t *testing.T, stays *edge) {
	w := stays.World
	login := tailscaleAPI(t, w)
	api := filepath.Join(w.Laptop.Dir, "fly-api")
	flyAPI(t, api)
	const drain = 10 * time.Second
	old := &edge{World: w, region: "ams", login: login, drain: drain, ip4: "172.19.0.20",
		env: []string{"TS_CLIENT_ID=" + clientID}, binds: []string{api + ":/.fly/api"}}
	next := &edge{World: w, region: "ams", login: login, drain: drain, ip4: "172.19.0.21",
		env: []string{"TS_AUTHKEY=" + clientSecret + appended(t) + "&baseURL=" + login}}
	old.start(t)

	admin := filepath.Join(w.Laptop.Dir, "haproxy.admin")
	server := " send-proxy-v2 check inter 200ms\n"
	stays.haproxy(t, "global\n stats socket "+admin+" level admin\n"+haproxyDefaults+
		"listen web\n bind "+w.Laptop.IP4.String()+":450\n option redispatch 1\n"+
		" server stays "+stays.ip4+":443"+server+" server old "+old.ip4+":443"+server+
		" server next "+next.ip4+":443 disabled"+server+
		"listen next\n bind "+w.Laptop.IP4.String()+":451\n server next "+next.ip4+":443 send-proxy-v2\n")
	stays.page(t, stays.browserAt(t, 450)) // home may not know the new node yet
	stays.page(t, stays.browserAt(t, 450))

	var onStays, onOld []*liveFlow
	for deadline := time.Now().Add(patience); len(onStays) < 2 || len(onOld) < 2; {
		f, err := stays.flow(t, 450)
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case stays.has(t, f):
			onStays = append(onStays, f)
		case old.has(t, f):
			onOld = append(onOld, f)
		default:
			t.Fatal("neither machine has the flow")
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d flows at the one machine, %d at the other", len(onStays), len(onOld))
		}
	}

	stop, stopped := make(chan struct{}), make(chan struct{})
	var came atomic.Int64
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if f, err := stays.flow(t, 450); err != nil {
				t.Errorf("connection %d: %v", came.Load(), err)
				return
			} else {
				f.Close()
			}
			came.Add(1)
		}
	}()
	defer func() { close(stop); <-stopped }()
	hasCome := func(what string) {
		t.Helper()
		before := came.Load()
		for deadline := time.Now().Add(patience); came.Load() < before+10; time.Sleep(10 * time.Millisecond) {
			if t.Failed() || time.Now().After(deadline) {
				t.Fatalf("%s: %d connections have come, %d before", what, came.Load(), before)
			}
		}
	}
	hasCome("before")
	next.start(t)
	stays.page(t, stays.browserAt(t, 451)) // as fly.io's check, it is waited for
	say, err := net.Dial("unix", admin)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(say, "enable server web/next")
	if answer, err := io.ReadAll(say); err != nil || strings.TrimSpace(string(answer)) != "" {
		t.Fatalf("%v: %s", err, answer)
	}
	say.Close()

	told := time.Now()
	ended := make(chan error, 1)
	go func() { // as fly.io: kill_signal, and after kill_timeout KILL
		after := int(patience.Seconds())
		_, err := w.Docker.Client.ContainerStop(t.Context(), old.id, client.ContainerStopOptions{Signal: "SIGTERM",
			Timeout: &after})
		ended <- err
	}()
	old.says(t, `"draining`)
	old.kill(t, "SIGINT")
	old.says(t, `"still draining`)
	hasCome("while it drains")
	for _, f := range append(onOld, onStays...) {
		if err := f.ask(); err != nil {
			t.Errorf("a flow has ended %v after the signal: %v", time.Since(told), err)
		}
	}
	onOld[0].Close()
	for ; onOld[1].ask() == nil; time.Sleep(20 * time.Millisecond) {
		if time.Since(told) > patience {
			t.Fatal("a flow goes on after the drain's end")
		}
	}
	if took := time.Since(told); took < drain {
		t.Errorf("a flow was cut %v after the signal, want %v at least", took, drain)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if code := old.wait(t); code != 0 {
		t.Errorf("it ended with status %d, want 0", code)
	}
	hasCome("after")
	for _, f := range onStays {
		if err := f.ask(); err != nil {
			t.Errorf("a flow of the other machine has ended: %v", err)
		}
	}
	for deadline := time.Now().Add(patience); ; {
		f, err := stays.flow(t, 450)
		if err != nil {
			t.Fatal(err)
		}
		if next.has(t, f) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no flow comes to the new machine")
		}
	}
	t.Logf("%d connections came", came.Load())
}

// liveFlow is a connection to the site that stays open.
type liveFlow struct {
	*tls.Conn
	r *bufio.Reader
}

// flow opens one by the proxy's port, and has got the page when it returns.
func (e *edge) flow(t *testing.T, port int) (*liveFlow, error) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c, err := e.Client.Dial(ctx, "tcp4", fmt.Sprintf("%s:%d", e.Laptop.IP4, port))
	if err != nil {
		return nil, err
	}
	f := &liveFlow{Conn: tls.Client(c, &tls.Config{RootCAs: e.CA.Pool, ServerName: lab.Site})}
	f.r = bufio.NewReader(f.Conn)
	t.Cleanup(func() { f.Close() })
	return f, f.ask()
}

// ask gets the page.
func (f *liveFlow) ask() error {
	f.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(f, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", lab.Site)
	res, err := http.ReadResponse(f.r, nil)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != 200 {
		return fmt.Errorf("%s", res.Status)
	}
	_, err = io.Copy(io.Discard, res.Body)
	return err
}

// has says whether a flow goes through this machine.
func (e *edge) has(t *testing.T, f *liveFlow) bool {
	t.Helper()
	var flows []struct{ Client string }
	out := e.exec(t, "tailsplice", "flows", "--json")
	if err := json.Unmarshal([]byte(out), &flows); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, had := range flows {
		if had.Client == f.LocalAddr().String() {
			return true
		}
	}
	return false
}

const (
	clientID     = "lab-client"
	clientSecret = "tskey-client-lab"
	audience     = "api.tailscale.com/" + clientID // as docs/fly.md has it by default
	accessToken  = "lab-access"
)

// appended is what docs/fly.md has people append to a client's secret.
func appended(t *testing.T) string {
	t.Helper()
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(filepath.Join(root, "docs/fly.md"))
	m := regexp.MustCompile("`([?]ephemeral[^`]*)`").FindSubmatch(page)
	if err != nil || m == nil {
		t.Fatalf("docs/fly.md appends nothing (%v)", err)
	}
	return string(m[1])
}

// flyAPI is the stand-in for the API in each machine, at a unix socket: it signs nothing.
func flyAPI(t *testing.T, socket string) {
	t.Helper()
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var asked struct{ Aud string }
		if err := json.NewDecoder(r.Body).Decode(&asked); err != nil || r.Method+r.URL.Path != "POST/v1/tokens/oidc" {
			http.Error(w, "unknown", http.StatusBadRequest)
			return
		}
		io.WriteString(w, "token for "+asked.Aud)
	})}
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
}

// tailscaleAPI is the tailnet's control server with a stand-in for Tailscale's API beside it, which gives an
// auth key to who has a token of flyAPI or the client's secret, for an ephemeral, approved node of tag:edge
// alone. The result is its URL.
func tailscaleAPI(t *testing.T, w *lab.World) string {
	t.Helper()
	addr := lab.Control4.String() + ":8090"
	ln, err := w.Inet.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	refuse := func(w http.ResponseWriter, r *http.Request) {
		t.Errorf("%s %s: %v", r.Method, r.URL, r.Form)
		http.Error(w, "no", http.StatusForbidden)
	}
	token := func(allowed func(r *http.Request) bool) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.ParseForm(); !allowed(r) {
				refuse(w, r)
				return
			}
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprintf(w, `{"access_token": %q, "token_type": "Bearer", "expires_in": 3600}`, accessToken)
		}
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /api/v2/oauth/token-exchange", token(func(r *http.Request) bool {
		return r.Form.Get("client_id") == clientID && r.Form.Get("jwt") == "token for "+audience
	}))
	mux.HandleFunc("POST /api/v2/oauth/token", token(func(r *http.Request) bool {
		_, secret, _ := r.BasicAuth()
		return secret == clientSecret || r.Form.Get("client_secret") == clientSecret
	}))
	mux.HandleFunc("POST /api/v2/tailnet/-/keys", func(w http.ResponseWriter, r *http.Request) {
		var asked struct {
			Capabilities struct {
				Devices struct {
					Create struct {
						Reusable, Ephemeral, Preauthorized bool
						Tags                               []string
					}
				}
			}
		}
		err := json.NewDecoder(r.Body).Decode(&asked)
		user, _, _ := r.BasicAuth()
		c := asked.Capabilities.Devices.Create
		if err != nil || user != accessToken && r.Header.Get("Authorization") != "Bearer "+accessToken ||
			c.Reusable || !c.Ephemeral || !c.Preauthorized || !slices.Equal(c.Tags, []string{"tag:edge"}) {
			t.Errorf("a key is asked for with %+v (%v)", c, err)
			refuse(w, r)
			return
		}
		fmt.Fprintf(w, `{"id": "k", "key": %q}`, authKey)
	})
	mux.Handle("/", w.Tailnet.Control)
	srv := &http.Server{Handler: mux}
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
	return "http://" + addr
}

// program is the number of the process that runs a program in the container, as dockerd sees it.
func (e *edge) program(t *testing.T, path string) string {
	t.Helper()
	top, err := e.Docker.Client.ContainerTop(t.Context(), e.id, client.ContainerTopOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range top.Processes {
		if strings.HasPrefix(p[len(p)-1], path+" ") {
			return p[1]
		}
	}
	t.Fatalf("no %s runs: %v", path, top.Processes)
	return ""
}

// killProgram kills it.
func (e *edge) killProgram(t *testing.T, path string) (pid string) {
	t.Helper()
	pid = e.program(t, path)
	if _, err := e.Laptop.Sh(t.Context(), "kill -KILL "+pid); err != nil {
		// dockerd has a PID namespace of its own, in which its ids hold.
		dockerd := fmt.Sprint(e.Docker.Process().Pid())
		if out, err := exec.Command("nsenter", "--target="+dockerd, "--pid", "--mount", "kill", "-KILL", pid).
			CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	return pid
}

// packagedImage runs the image that `make packages` makes, with a configuration that is mounted.
func packagedImage(t *testing.T, w *lab.World) {
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	c := exec.Command("go", "run", ".", "-arch", "amd64", "-version", "v1.0.0", "-out", out)
	c.Dir = filepath.Join(root, "deploy/packages")
	if text, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	load := exec.Command("sh", "-ec", block(t, "docs/install.md", "docker load"))
	load.Dir = out
	load.Env = append(os.Environ(), "DOCKER_HOST=unix://"+w.Docker.Socket)
	said, err := load.CombinedOutput()
	if err != nil || !strings.Contains(string(said), "Loaded image: tailsplice:v1.0.0") {
		t.Fatalf("docker load: %v\n%s", err, said)
	}
	config := filepath.Join(w.Laptop.Dir, "image.yaml")
	yaml := "listeners: [{ listen: [\":80\"], mode: http, default: { forward: \"127.0.0.1:9464\" } }]\n" +
		"control: { metrics: \"127.0.0.1:9464\" }\n"
	if err := os.WriteFile(config, []byte(yaml), 0o644); err != nil {
		t.Fatal(err)
	}
	e := &edge{World: w}
	created, err := w.Docker.Client.ContainerCreate(t.Context(), client.ContainerCreateOptions{
		Name: "packaged", Config: &container.Config{Image: "tailsplice:v1.0.0"},
		HostConfig: &container.HostConfig{Binds: []string{config + ":/etc/tailsplice/tailsplice.yaml:ro"}}})
	if err != nil {
		t.Fatal(err)
	}
	e.id = created.ID
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(e.log(t))
		}
		if err := w.Docker.Remove(context.Background(), e.id); err != nil {
			t.Error(err)
		}
	})
	if _, err := w.Docker.Client.ContainerStart(t.Context(), e.id, client.ContainerStartOptions{}); err != nil {
		t.Fatal(err)
	}
	e.says(t, `"tailsplice runs"`)
	ip, err := w.Docker.Addr(t.Context(), "packaged")
	if err != nil {
		t.Fatal(err)
	}
	b := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true, DialContext: w.Laptop.Dial}}
	res, err := b.Get("http://" + ip.String() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if body, err := io.ReadAll(res.Body); err != nil || !strings.Contains(string(body), "tailsplice_") {
		t.Errorf("%s: %v: %.300s", res.Status, err, body)
	}
	e.kill(t, "SIGTERM")
	if code := e.wait(t); code != 0 {
		t.Errorf("it ended with status %d, want 0", code)
	}
}

// edge is the container.
type edge struct {
	*lab.World
	region      string
	login       string // server
	drain       time.Duration
	env, binds  []string
	id          string
	ip4, ip6    string // ip4 is given, or Docker's choice
	connections int    // that browsers have made
}

// build does what `make fly` and `fly deploy` do.
func (e *edge) build(t *testing.T) {
	t.Helper()
	root := e.root(t)
	dir := filepath.Join(root, "build/test/fly")
	if err := os.RemoveAll(dir); err != nil { // make keeps configurations that are there
		t.Fatal(err)
	}
	// deploy/fly's TestPage types all blocks in order.
	for _, step := range [][2]string{{"make fly\n", root}, {"tailsplice check", dir}} {
		c := exec.Command("sh", "-ec", block(t, "docs/fly.md", step[0]))
		c.Dir = step[1]
		c.Env = append(os.Environ(), "MAKEFLAGS=BUILD=build/test")
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", step[0], err, out)
		}
	}
	var src bytes.Buffer
	tw := tar.NewWriter(&src)
	if err := tw.AddFS(os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	res, err := e.Docker.Client.ImageBuild(t.Context(), &src, client.ImageBuildOptions{
		Tags: []string{image}, Version: build.BuilderV1, Remove: true})
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	log, err := io.ReadAll(res.Body)
	if err != nil || !strings.Contains(string(log), "Successfully built") {
		t.Fatalf("build the image: %v\n%s", err, log)
	}
}

func (e *edge) root(t *testing.T) string {
	t.Helper()
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// block is that of a page which has a text.
func block(t *testing.T, page, text string) string {
	t.Helper()
	p, err := lab.ReadPage(page)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range p.Blocks() {
		if strings.Contains(b, text) {
			return b
		}
	}
	t.Fatalf("%s has no block with %q", page, text)
	return ""
}

// start runs a machine, and waits until it serves.
func (e *edge) start(t *testing.T) {
	t.Helper()
	env := append([]string{"FLY_REGION=" + e.region, "DRAIN_TIMEOUT=" + e.drain.String(), "TS_LOGIN_SERVER=" + e.login,
		"TS_PANIC_IF_HIT_MAIN_CONTROL=1", "TS_NO_LOGS_NO_SUPPORT=true", "TS_DISABLE_PORTMAPPER=1"}, e.env...)
	var at *network.EndpointIPAMConfig
	if e.ip4 != "" {
		at = &network.EndpointIPAMConfig{IPv4Address: netip.MustParseAddr(e.ip4)}
	}
	created, err := e.Docker.Client.ContainerCreate(t.Context(), client.ContainerCreateOptions{
		Config: &container.Config{Image: image, Env: env},
		HostConfig: &container.HostConfig{NetworkMode: "fly", CapAdd: []string{"NET_ADMIN"}, Binds: e.binds,
			Resources: container.Resources{Memory: 256 << 20, Devices: []container.DeviceMapping{
				{PathOnHost: tun, PathInContainer: tun, CgroupPermissions: "rwm"}}}},
		NetworkingConfig: &network.NetworkingConfig{EndpointsConfig: map[string]*network.EndpointSettings{
			"fly": {IPAMConfig: at}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	e.id = created.ID
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(e.log(t))
		}
		if err := e.Docker.Remove(context.Background(), created.ID); err != nil {
			t.Error(err)
		}
	})
	if _, err := e.Docker.Client.ContainerStart(t.Context(), e.id, client.ContainerStartOptions{}); err != nil {
		t.Fatal(err)
	}
	res, err := e.Docker.Client.ContainerInspect(t.Context(), e.id, client.ContainerInspectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	n := res.Container.NetworkSettings.Networks["fly"]
	e.ip4, e.ip6 = n.IPAddress.String(), n.GlobalIPv6Address.String()
	e.says(t, `"tailsplice runs"`)
}

// proxy is the stand-in for fly.io's: it checks the port, and adds a PROXY header. The container's addresses
// stay.
func (e *edge) proxy(t *testing.T) {
	t.Helper()
	config := haproxyDefaults
	for family, ip := range map[int]string{4: e.ip4, 6: e.ip6} {
		config += fmt.Sprintf("listen web%d\n bind %s:44%d\n server edge %s send-proxy-v2 check inter 500ms\n", family,
			e.Laptop.IP4, family, net.JoinHostPort(ip, "443"))
	}
	e.haproxy(t, config)
}

const haproxyDefaults = "defaults\n mode tcp\n timeout connect 5s\n timeout client 10m\n timeout server 10m\n"

// haproxy runs one until the world ends.
func (e *edge) haproxy(t *testing.T, config string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "haproxy.cfg")
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Laptop.StartProcess("haproxy", []string{"haproxy", "-db", "-f", file}, nil); err != nil {
		t.Fatal(err)
	}
}

// browser opens the site by the proxy.
func (e *edge) browser(t *testing.T, family int) *http.Client { return e.browserAt(t, 440+family) }

// browserAt is browser for a port of the proxy.
func (e *edge) browserAt(t *testing.T, port int) *http.Client {
	tr := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			e.connections++
			return e.Client.Dial(ctx, "tcp4", fmt.Sprintf("%s:%d", e.Laptop.IP4, port))
		},
		TLSClientConfig: &tls.Config{RootCAs: e.CA.Pool},
	}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: patience}
}

// page wants the page with the client's address.
func (e *edge) page(t *testing.T, b *http.Client) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(200 * time.Millisecond) {
		body, err := func() ([]byte, error) {
			res, err := b.Get("https://" + lab.Site + "/")
			if err != nil {
				return nil, err
			}
			defer res.Body.Close()
			if res.StatusCode != 200 {
				return nil, fmt.Errorf("%s", res.Status)
			}
			return io.ReadAll(res.Body)
		}()
		if err != nil && time.Now().Before(deadline) {
			continue // home may not know the new node yet
		}
		var h http.Header
		if err == nil {
			err = json.Unmarshal(body, &h)
		}
		if err != nil {
			t.Fatal(err)
		}
		if had := h.Get("X-Forwarded-For"); had != e.Client.IP4.String() {
			t.Fatalf("home was told that the client is %q, want %v", had, e.Client.IP4)
		}
		return
	}
}

// node is the machine's address in the tailnet.
func (e *edge) node(t *testing.T) string {
	t.Helper()
	s, err := e.Home.Node.Local.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range s.Peer {
		if strings.HasPrefix(p.DNSName, "edge-waw.") {
			return p.TailscaleIPs[0].String()
		}
	}
	t.Fatal("home knows no edge-waw")
	return ""
}

// exec runs a command in the container, and returns what it printed.
func (e *edge) exec(t *testing.T, argv ...string) string {
	t.Helper()
	c, err := e.Docker.Client.ExecCreate(t.Context(), e.id, client.ExecCreateOptions{
		Cmd: argv, AttachStdout: true, AttachStderr: true})
	if err != nil {
		t.Fatal(err)
	}
	a, err := e.Docker.Client.ExecAttach(t.Context(), c.ID, client.ExecAttachOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	var out bytes.Buffer
	if _, err := stdcopy.StdCopy(&out, &out, a.Reader); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func (e *edge) kill(t *testing.T, signal string) {
	t.Helper()
	if _, err := e.Docker.Client.ContainerKill(t.Context(), e.id, client.ContainerKillOptions{Signal: signal}); err != nil {
		t.Fatal(err)
	}
}

// wait gives the container's exit status.
func (e *edge) wait(t *testing.T) int {
	t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		res, err := e.Docker.Client.ContainerInspect(t.Context(), e.id, client.ContainerInspectOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if !res.Container.State.Running {
			return res.Container.State.ExitCode
		}
	}
	t.Fatal("it does not end")
	return 0
}

// says waits until the container has printed a text.
func (e *edge) says(t *testing.T, text string) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		log := e.log(t)
		if strings.Contains(log, text) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("it does not print %q", text)
		}
	}
}

func (e *edge) log(t *testing.T) string {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	r, err := e.Docker.Client.ContainerLogs(ctx, e.id, client.ContainerLogsOptions{ShowStdout: true, ShowStderr: true})
	if err != nil {
		return err.Error()
	}
	defer r.Close()
	var b bytes.Buffer
	stdcopy.StdCopy(&b, &b, r)
	return regexp.MustCompile(`(?m)^\S+ \S+ magicsock.*\n`).ReplaceAllString(b.String(), "")
}
