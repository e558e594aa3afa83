package fly

import (
	"archive/tar"
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
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/build"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

const (
	image    = "tailsplice-lab/fly"
	patience = time.Minute
	tun      = "/dev/net/tun"
)

// homeConfig answers with the request's headers.
var homeConfig = strings.Replace(lab.HomeConfig, "tailnet://laptop:8080", "127.0.0.1:9100", 1)

func TestEdge(t *testing.T) {
	lab.Require(t, lab.Options{}, "haproxy", "make", "docker")
	w := lab.Start(t, lab.Options{})
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

	e := &edge{World: w}
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
		e.start(t)
		e.killProgram(t, "/usr/bin/tailscaled")
		if code := e.wait(t); code != 1 {
			t.Errorf("it ended with status %d, want 1, so that the machine is started anew", code)
		}
		e.says(t, "tailscaled ended")
	})
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
	id          string
	ip4, ip6    string
	connections int // that browsers have made
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
	created, err := e.Docker.Client.ContainerCreate(t.Context(), client.ContainerCreateOptions{
		Config: &container.Config{Image: image, Env: []string{
			"FLY_REGION=waw", "TS_AUTHKEY=tskey-auth-lab", "DRAIN_TIMEOUT=301s",
			"TS_LOGIN_SERVER=" + e.Tailnet.Control.ExplicitBaseURL,
			"TS_PANIC_IF_HIT_MAIN_CONTROL=1", "TS_NO_LOGS_NO_SUPPORT=true", "TS_DISABLE_PORTMAPPER=1"}},
		HostConfig: &container.HostConfig{NetworkMode: "fly", CapAdd: []string{"NET_ADMIN"},
			Resources: container.Resources{Memory: 256 << 20, Devices: []container.DeviceMapping{
				{PathOnHost: tun, PathInContainer: tun, CgroupPermissions: "rwm"}}}},
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
	e.says(t, "warning: DRAIN_TIMEOUT is 5m1s")
}

// proxy is the stand-in for fly.io's: it checks the port, and adds a PROXY header. The container's addresses
// stay.
func (e *edge) proxy(t *testing.T) {
	t.Helper()
	config := "defaults\n mode tcp\n timeout connect 5s\n timeout client 10m\n timeout server 10m\n"
	for family, ip := range map[int]string{4: e.ip4, 6: e.ip6} {
		config += fmt.Sprintf("listen web%d\n bind %s:44%d\n server edge %s send-proxy-v2 check inter 500ms\n", family,
			e.Laptop.IP4, family, net.JoinHostPort(ip, "443"))
	}
	file := filepath.Join(e.Laptop.Dir, "haproxy.cfg")
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Laptop.StartProcess("haproxy", []string{"haproxy", "-db", "-f", file}, nil); err != nil {
		t.Fatal(err)
	}
}

// browser opens the site by the proxy.
func (e *edge) browser(t *testing.T, family int) *http.Client {
	tr := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			e.connections++
			return e.Client.Dial(ctx, "tcp4", fmt.Sprintf("%s:44%d", e.Laptop.IP4, family))
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
