package lab

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/moby/moby/api/pkg/stdcopy"
	"github.com/moby/moby/api/types/build"
	"github.com/moby/moby/api/types/container"
	dockernet "github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"
)

// Docker is the dockerd of a host.
type Docker struct {
	Client *client.Client
	Socket string // seen from outside; on the host it is the default, /run/docker.sock

	host *Host
	proc *Process
}

const (
	blogImage = "tailsplice-lab/blog"
	BlogPort  = 8080
)

// dockerInit is PID 1 of a namespace for dockerd, containerd, the shims and the containers: when it dies, the
// kernel kills them all, which dockerd alone can't promise of its shims. It also reaps what they leave.
const dockerInit = `
mount -t proc proc /proc
trap 'kill -TERM $p' TERM
"$@" & p=$!
while kill -0 $p 2>/dev/null; do wait $p || :; done
`

// startDocker starts a dockerd on the laptop, with the blog in a container.
func (w *World) startDocker(ctx context.Context, blog string) error {
	h := w.Laptop
	d := &Docker{host: h, Socket: filepath.Join(h.Dir, "run/docker.sock")}
	conf := filepath.Join(h.Dir, "dockerd.json")
	if err := os.WriteFile(conf, []byte("{}"), 0o644); err != nil {
		// not the machine's /etc/docker/daemon.json
		return err
	}
	argv := []string{
		"/bin/sh", "-c", dockerInit, "dockerd", "dockerd", "-H", "unix:///run/docker.sock", "--config-file", conf,
		"--data-root", filepath.Join(h.Dir, "docker"), "--exec-root", "/run/docker", "--pidfile", "/run/docker.pid",
		"--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent", cgroupParent + "/" + w.run.id,
		"--userland-proxy=false", "--log-level", "warn", "--ip6tables=false",
	}
	var err error
	d.proc, err = h.StartProcess("dockerd", argv, func(c *Cmd) {
		c.SysProcAttr.Cloneflags = unix.CLONE_NEWPID | unix.CLONE_NEWNS
	})
	if err != nil {
		return err
	}
	d.Client, err = client.New(client.WithHost("unix://" + d.Socket))
	if err != nil {
		return err
	}
	w.onClose(func() { d.Client.Close() })
	if err := d.proc.waitFor(ctx, "ready", func() error {
		_, err := d.Client.Ping(ctx, client.PingOptions{})
		return err
	}); err != nil {
		return err
	}
	if err := d.build(ctx, blog); err != nil {
		return fmt.Errorf("build the blog's image: %w", err)
	}
	if _, err := d.RunBlog(ctx, "blog", nil); err != nil {
		return err
	}
	w.Docker = d
	w.options.Progress("lab: the blog runs in a container of the laptop")
	return nil
}

// build makes the blog's image from scratch, without any registry.
func (d *Docker) build(ctx context.Context, blog string) error {
	bin, err := os.ReadFile(blog)
	if err != nil {
		return err
	}
	const dockerfile = "FROM scratch\nCOPY blog /blog\nEXPOSE 8080\nENTRYPOINT [\"/blog\"]\n"
	var src bytes.Buffer
	tw := tar.NewWriter(&src)
	for _, f := range []struct {
		name string
		data []byte
	}{{"Dockerfile", []byte(dockerfile)}, {"blog", bin}} {
		if err := tw.WriteHeader(&tar.Header{Name: f.name, Mode: 0o755, Size: int64(len(f.data))}); err != nil {
			return err
		}
		tw.Write(f.data)
	}
	if err := tw.Close(); err != nil {
		return err
	}
	res, err := d.Client.ImageBuild(ctx, &src, client.ImageBuildOptions{
		Tags: []string{blogImage}, Version: build.BuilderV1, Remove: true,
	})
	if err != nil {
		return err
	}
	defer res.Body.Close()
	for dec := json.NewDecoder(res.Body); ; {
		var msg struct{ Error string }
		if err := dec.Decode(&msg); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		if msg.Error != "" {
			return fmt.Errorf("%s", msg.Error)
		}
	}
}

// Network makes a network for containers with these prefixes, IPv4 and IPv6. The result removes it.
func (d *Docker) Network(ctx context.Context, name string, prefixes ...netip.Prefix) (remove func() error, err error) {
	six := true
	o := client.NetworkCreateOptions{EnableIPv6: &six, IPAM: &dockernet.IPAM{}}
	for _, p := range prefixes {
		o.IPAM.Config = append(o.IPAM.Config, dockernet.IPAMConfig{Subnet: p})
	}
	if _, err := d.Client.NetworkCreate(ctx, name, o); err != nil {
		return nil, fmt.Errorf("create network %s: %w", name, err)
	}
	return func() error {
		_, err := d.Client.NetworkRemove(context.Background(), name, client.NetworkRemoveOptions{})
		return err
	}, nil
}

// RunBlog starts one more container of the blog's image, waits until it answers, and returns its address.
// Labels may make it look like a service of docker compose. It keeps to the container's name; [Docker.Remove]
// removes it.
func (d *Docker) RunBlog(ctx context.Context, name string, labels map[string]string) (netip.Addr, error) {
	return d.RunBlogIn(ctx, "", name, labels)
}

// RunBlogIn is RunBlog in a network; "" is docker's default.
func (d *Docker) RunBlogIn(ctx context.Context, network, name string, labels map[string]string) (netip.Addr, error) {
	created, err := d.Client.ContainerCreate(ctx, client.ContainerCreateOptions{
		Name: name,
		Config: &container.Config{
			Image: blogImage, Hostname: name, Labels: labels, Env: []string{"CLOUD=http://cloud.example/hello"},
		},
		HostConfig: &container.HostConfig{NetworkMode: container.NetworkMode(network), ExtraHosts: []string{"cloud.example:" + cloud4.String()}},
	})
	if err != nil {
		return netip.Addr{}, fmt.Errorf("create container %s: %w", name, err)
	}
	if _, err := d.Client.ContainerStart(ctx, created.ID, client.ContainerStartOptions{}); err != nil {
		return netip.Addr{}, fmt.Errorf("start container %s: %w", name, err)
	}
	addr, err := d.Addr(ctx, name)
	if err != nil {
		return netip.Addr{}, err
	}
	return addr, d.proc.waitFor(ctx, "running "+name, func() error {
		c, err := d.host.Dial(ctx, "tcp", netip.AddrPortFrom(addr, BlogPort).String())
		if err == nil {
			c.Close()
		}
		return err
	})
}

// Addr is the container's address on docker's bridge.
func (d *Docker) Addr(ctx context.Context, name string) (netip.Addr, error) {
	res, err := d.Client.ContainerInspect(ctx, name, client.ContainerInspectOptions{})
	if err != nil {
		return netip.Addr{}, err
	}
	for _, n := range res.Container.NetworkSettings.Networks {
		if n.IPAddress.IsValid() {
			return n.IPAddress, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("container %s has no address", name)
}

// Remove kills and removes a container.
func (d *Docker) Remove(ctx context.Context, name string) error {
	_, err := d.Client.ContainerRemove(ctx, name, client.ContainerRemoveOptions{Force: true})
	return err
}

// Process is the dockerd, for its log and signals.
func (d *Docker) Process() *Process { return d.proc }

// logs is the end of the blog's log.
func (d *Docker) logs(lines int) string {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	r, err := d.Client.ContainerLogs(ctx, "blog", client.ContainerLogsOptions{
		ShowStdout: true, ShowStderr: true, Tail: fmt.Sprint(lines),
	})
	if err != nil {
		return "\n=== laptop: container blog: " + err.Error() + "\n"
	}
	defer r.Close()
	var b strings.Builder
	b.WriteString("\n=== laptop: container blog\n")
	stdcopy.StdCopy(&b, &b, r)
	return b.String()
}
