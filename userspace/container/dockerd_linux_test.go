package container

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"github.com/vishvananda/netns"
)

// daemon is a real dockerd in namespaces of its own. Everything that it starts
// ends with the test process, however that ends: the shell that is the first
// process of its PID namespace reads commands from a pipe, and leaves when the
// pipe closes.
type daemon struct {
	t        *testing.T
	host     string
	commands io.Writer
	answers  io.Reader
	net      netns.NsHandle
	health   *container.HealthConfig // of the containers that create makes
	api      *client.Client
}

// The first process: "start", "stop" (SIGTERM) and "kill" a dockerd.
const firstProcess = `
ip link set lo up
while read -r command; do
	case $command in
	start) dockerd -H "unix://$1/sock" --data-root "$1/data" --exec-root "$1/exec" --pidfile "$1/pid" \
		--config-file "$1/config" >>"$1/log" 2>&1 <&- & ;;
	stop) kill -TERM $!; wait $! ;;
	kill) kill -KILL $!; wait $! 2>/dev/null; rm -f "$1/sock" "$1/pid" ;;
	esac
	echo done
done`

// need skips the test for want of something, which CI must have.
func need(t *testing.T, ok bool, what string) {
	t.Helper()
	if ok {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("needs %s", what)
	}
	t.Skipf("needs %s", what)
}

func startDocker(t *testing.T) *daemon {
	need(t, os.Getuid() == 0, "root, to run a dockerd in namespaces of its own")
	for program, from := range map[string]string{"dockerd": "docker.io", "busybox": "busybox-static", "unshare": "util-linux", "ip": "iproute2"} {
		_, err := exec.LookPath(program)
		need(t, err == nil, program+" (Debian: "+from+")")
	}
	// Not t.TempDir: the path of a unix socket must be short.
	dir, err := os.MkdirTemp("", "tsctr")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.WriteFile(filepath.Join(dir, "config"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--net", "sh", "-c", firstProcess, "sh", dir)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	d := &daemon{t: t, host: "unix://" + dir + "/sock", commands: stdin, answers: stdout}
	t.Cleanup(func() {
		d.command("stop")
		stdin.Close()
		cmd.Wait()
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(dir, "log"))
			t.Logf("dockerd:\n%s", log[max(0, len(log)-4000):])
		}
	})
	d.start()
	// The shell is unshare's only child.
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", cmd.Process.Pid, cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(children)))
	if err != nil {
		t.Fatal(err)
	}
	if d.net, err = netns.GetFromPid(pid); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.net.Close() })
	return d
}

func (d *daemon) command(c string) {
	d.t.Helper()
	if _, err := fmt.Fprintln(d.commands, c); err != nil {
		d.t.Error(err)
	}
	if _, err := io.ReadFull(d.answers, make([]byte, len("done\n"))); err != nil {
		d.t.Error(err)
	}
}

// start starts the dockerd and waits until it answers.
func (d *daemon) start() {
	d.t.Helper()
	d.command("start")
	api, err := client.New(client.WithHost(d.host))
	if err != nil {
		d.t.Fatal(err)
	}
	d.api = api
	d.eventually(func() error {
		_, err := api.Info(d.t.Context(), client.InfoOptions{})
		return err
	})
}

// image imports a root that holds busybox alone.
func (d *daemon) image(name string) {
	d.t.Helper()
	path, _ := exec.LookPath("busybox")
	program, err := os.ReadFile(path)
	if err != nil {
		d.t.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	w.WriteHeader(&tar.Header{Name: "busybox", Mode: 0o755, Size: int64(len(program))})
	w.Write(program)
	w.WriteHeader(&tar.Header{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755})
	w.Close()
	got, err := d.api.ImageImport(d.t.Context(), client.ImageImportSource{Source: &b, SourceName: "-"}, name, client.ImageImportOptions{})
	if err != nil {
		d.t.Fatal(err)
	}
	io.Copy(io.Discard, got)
	got.Close()
}

// checked makes a container that runs, with a health check that passes once healthy was called. Until then it is
// starting, and unhealthy at last.
func (d *daemon) checked(name string, labels map[string]string) {
	d.t.Helper()
	d.health = &container.HealthConfig{Test: []string{"CMD", "/busybox", "test", "-e", "/etc/good"}, Interval: 200 * time.Millisecond, Retries: 5}
	d.run(name, labels, "")
	d.health = nil
}

// healthy makes the health check of a container pass.
func (d *daemon) healthy(name string) {
	d.t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	w.WriteHeader(&tar.Header{Name: "good", Mode: 0o644})
	w.Close()
	if _, err := d.api.CopyToContainer(d.t.Context(), name, client.CopyToContainerOptions{DestinationPath: "/etc", Content: &b}); err != nil {
		d.t.Fatal(err)
	}
}

// create makes a container that serves its host name, which is its own name.
func (d *daemon) create(name string, labels map[string]string, mode string, networks ...string) string {
	d.t.Helper()
	config := &container.Config{
		Image: "box", Labels: labels, Hostname: name, StopSignal: "SIGKILL", Healthcheck: d.health,
		Cmd: []string{"/busybox", "httpd", "-f", "-p", "80", "-h", "/etc"},
	}
	if !strings.HasPrefix(mode, "container:") {
		config.ExposedPorts = network.PortSet{network.MustParsePort("80/tcp"): {}, network.MustParsePort("80/udp"): {}}
	}
	if mode == "host" || strings.HasPrefix(mode, "container:") {
		config.Hostname = "" // it has another's
	}
	net := &network.NetworkingConfig{EndpointsConfig: map[string]*network.EndpointSettings{}}
	for _, n := range networks {
		net.EndpointsConfig[n] = &network.EndpointSettings{}
	}
	got, err := d.api.ContainerCreate(d.t.Context(), client.ContainerCreateOptions{
		Name: name, Config: config, HostConfig: &container.HostConfig{NetworkMode: container.NetworkMode(mode)}, NetworkingConfig: net,
	})
	if err != nil {
		d.t.Fatal(err)
	}
	return got.ID
}

func (d *daemon) run(name string, labels map[string]string, mode string, networks ...string) string {
	d.t.Helper()
	id := d.create(name, labels, mode, networks...)
	d.up(name)
	return id
}

func (d *daemon) up(name string) {
	d.t.Helper()
	if _, err := d.api.ContainerStart(d.t.Context(), name, client.ContainerStartOptions{}); err != nil {
		d.t.Fatal(err)
	}
}

func (d *daemon) down(name string) {
	d.t.Helper()
	now := 0
	if _, err := d.api.ContainerStop(d.t.Context(), name, client.ContainerStopOptions{Timeout: &now}); err != nil {
		d.t.Fatal(err)
	}
}

func (d *daemon) remove(name string) {
	d.t.Helper()
	if _, err := d.api.ContainerRemove(d.t.Context(), name, client.ContainerRemoveOptions{Force: true}); err != nil {
		d.t.Fatal(err)
	}
}

// whoAt asks a container at a for its host name.
func (d *daemon) whoAt(a netip.Addr) string {
	d.t.Helper()
	web := http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true, DialContext: d.dial}}
	var who string
	d.eventually(func() error { // it may not listen yet
		r, err := web.Get("http://" + netip.AddrPortFrom(a, 80).String() + "/hostname")
		if err != nil {
			return err
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		who = strings.TrimSpace(string(b))
		return err
	})
	return who
}

// dial connects from the daemon's network namespace.
func (d *daemon) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	type result struct {
		c   net.Conn
		err error
	}
	got := make(chan result)
	ns := d.net
	go func() {
		runtime.LockOSThread() // and never back: the thread ends with the goroutine
		if err := netns.Set(ns); err != nil {
			got <- result{err: err}
			return
		}
		c, err := new(net.Dialer).DialContext(ctx, network, addr)
		got <- result{c, err}
	}()
	r := <-got
	return r.c, r.err
}

func (d *daemon) eventually(f func() error) {
	d.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			d.t.Fatalf("not within %s: %v", patience, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
