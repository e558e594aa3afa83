package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Host is a machine of the world: a network, mount and UTS namespace with a private /etc and /run.
// Its methods may be called from any goroutine.
type Host struct {
	Name string // "edge-a"; also what hostname says there
	NS   string // the network namespace's name under /run/netns
	// the host's files as seen from outside: Dir/run is its /run, Dir/log its logs, Dir/home its $HOME
	Dir  string
	IP4  netip.Addr // address of the current uplink
	IP6  netip.Addr // likewise; invalid where the uplink has IPv4 only
	Node *Node      // its place in the tailnet; nil for hosts outside it

	world *World
	tid   int // the thread that holds the namespaces
	jobs  chan func()
	ended chan struct{}
	ns    netns.NsHandle
	nl    *netlink.Handle

	mu      sync.Mutex
	uplinks []*uplink
	current *uplink
	procs   []*Process
}

// newHost makes the namespaces. The caller closes the host, also when others fail.
func (w *World) newHost(name string) (*Host, error) {
	h := &Host{
		Name: name, NS: w.run.id + "-" + name, Dir: filepath.Join(w.run.dir, name), world: w,
		jobs: make(chan func()), ended: make(chan struct{}), ns: netns.None(),
	}
	for _, d := range []string{"run/lock", "etc", "etc.work", "log", "home"} {
		if err := os.MkdirAll(filepath.Join(h.Dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	ready := make(chan error, 1)
	go h.thread(ready)
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("make host %s: %w", name, err)
	}
	var err error
	if h.nl, err = netlink.NewHandleAt(h.ns, unix.NETLINK_ROUTE); err != nil {
		h.close()
		return nil, fmt.Errorf("make host %s: netlink: %w", name, err)
	}
	lo, err := h.nl.LinkByName("lo")
	if err == nil {
		err = h.nl.LinkSetUp(lo)
	}
	if err != nil {
		h.close()
		return nil, fmt.Errorf("make host %s: %w", name, err)
	}
	return h, nil
}

// thread lives in the host's namespaces until the host is closed, and does its jobs one after the other. It
// is never unlocked: it dies with its goroutine, and so can't carry the namespaces to anyone else. Children
// started here get PDEATHSIG when this very thread ends.
func (h *Host) thread(ready chan<- error) {
	runtime.LockOSThread()
	defer close(h.ended)
	if err := h.enter(); err != nil {
		ready <- err
		return
	}
	ready <- nil
	for job := range h.jobs {
		job()
	}
}

func (h *Host) enter() (err error) {
	// The name is made in the machine's mount namespace, before this thread leaves it.
	if h.ns, err = netns.NewNamed(h.NS); err != nil {
		return fmt.Errorf("network namespace: %w", err)
	}
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS | unix.CLONE_NEWUTS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	h.tid = unix.Gettid()
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private (in a chroot, / must be a mount point): %w", err)
	}
	overlay := fmt.Sprintf("lowerdir=/etc,upperdir=%s/etc,workdir=%s/etc.work", h.Dir, h.Dir)
	if err := unix.Mount("overlay", "/etc", "overlay", 0, overlay); err != nil {
		return fmt.Errorf("mount a private /etc (set TMPDIR to a directory that isn't itself on an overlay): %w", err)
	}
	// A private /run makes default socket paths right on every host, and hides the machine's D-Bus:
	// tailscaled would configure the real systemd-resolved through it.
	if err := unix.Mount(filepath.Join(h.Dir, "run"), "/run", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount a private /run: %w", err)
	}
	if err := unix.Sethostname([]byte(h.Name)); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	for name, value := range map[string]string{
		"ipv4/ip_forward": "0", "ipv4/conf/all/rp_filter": "0", "ipv4/conf/default/rp_filter": "0",
		"ipv6/conf/all/accept_dad": "0", "ipv6/conf/default/accept_dad": "0", "ipv6/conf/default/dad_transmits": "0",
		"ipv6/conf/all/accept_ra": "0", "ipv6/conf/default/accept_ra": "0",
		"ipv6/conf/all/keep_addr_on_down": "1", "ipv6/conf/default/keep_addr_on_down": "1",
	} {
		if err := os.WriteFile("/proc/sys/net/"+name, []byte(value), 0); err != nil {
			return fmt.Errorf("sysctl: %w", err)
		}
	}
	if err := os.Remove("/etc/resolv.conf"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err // often a link to what isn't there any more
	}
	if err := os.WriteFile("/etc/resolv.conf", nil, 0o644); err != nil {
		return err
	}
	return os.WriteFile("/etc/hostname", []byte(h.Name+"\n"), 0o644)
}

// Sysctl sets net.NAME in the host, e.g. "ipv4/ip_forward".
func (h *Host) Sysctl(name, value string) error {
	return h.Do(func() error { return os.WriteFile("/proc/sys/net/"+name, []byte(value), 0) })
}

// Do runs f on the host's thread, in all of its namespaces; what f opens stays there. f must be short, since
// all starts of processes on this host wait for it, and must not start goroutines that rely on the
// namespaces.
func (h *Host) Do(f func() error) error {
	done := make(chan error, 1)
	select {
	case h.jobs <- func() { done <- f() }:
		return <-done
	case <-h.ended:
		return fmt.Errorf("%s: %w", h.Name, net.ErrClosed)
	}
}

// inNet runs f on a throw-away thread in the host's network namespace only. f may block.
func (h *Host) inNet(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread dies with the goroutine
		if err := netns.Set(h.ns); err != nil {
			done <- fmt.Errorf("enter %s: %w", h.NS, err)
			return
		}
		done <- f()
	}()
	return <-done
}

// close ends the host's thread; processes that still run there are killed. It does not remove the name of the
// namespace, which is the run's to remove.
func (h *Host) close() {
	if h.nl != nil {
		h.nl.Close()
	}
	select {
	case <-h.ended:
	default:
		close(h.jobs)
		<-h.ended
	}
	if h.ns.IsOpen() {
		h.ns.Close()
	}
}

// WriteFile writes a file as seen by the host (its own /etc and /run), with its directories.
func (h *Host) WriteFile(name string, data []byte, mode os.FileMode) error {
	return h.Do(func() error {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		return os.WriteFile(name, data, mode)
	})
}

// ReadFile reads a file as seen by the host.
func (h *Host) ReadFile(name string) (b []byte, err error) {
	err = h.Do(func() (err error) { b, err = os.ReadFile(name); return })
	return b, err
}

// Dial connects from the host. Names are looked up in [World.Names] only; a network of "tcp4" or "tcp6"
// restricts the family, otherwise IPv4 is taken where there is a choice.
func (h *Host) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	return h.DialFrom(ctx, network, "", addr)
}

// DialFrom is Dial from a source address ("203.0.113.7:0"; "" for any).
func (h *Host) DialFrom(ctx context.Context, network, source, addr string) (c net.Conn, err error) {
	addr, err = h.world.literal(network, addr)
	if err != nil {
		return nil, err
	}
	var d net.Dialer
	d.SetMultipathTCP(false)
	if source != "" {
		if strings.HasPrefix(network, "udp") {
			d.LocalAddr, err = net.ResolveUDPAddr(network, source)
		} else {
			d.LocalAddr, err = net.ResolveTCPAddr(network, source)
		}
		if err != nil {
			return nil, err
		}
	}
	// An address literal makes the dialer open the one socket in the calling goroutine, so on this thread.
	err = h.inNet(func() (err error) { c, err = d.DialContext(ctx, network, addr); return })
	return c, err
}

// Listen listens on the host. The caller closes it.
func (h *Host) Listen(network, addr string) (ln net.Listener, err error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	err = h.inNet(func() (err error) { ln, err = lc.Listen(context.Background(), network, addr); return })
	return ln, err
}

// ListenPacket is Listen for UDP.
func (h *Host) ListenPacket(network, addr string) (pc net.PacketConn, err error) {
	err = h.inNet(func() (err error) { pc, err = net.ListenPacket(network, addr); return })
	return pc, err
}

// Cmd is an [exec.Cmd] that starts in a host's namespaces and dies with this process.
type Cmd struct {
	*exec.Cmd
	host *Host
}

// Command prepares a program to run on the host, with $HOME in Host.Dir and / as its directory. ctx kills it.
func (h *Host) Command(ctx context.Context, name string, arg ...string) *Cmd {
	c := exec.CommandContext(ctx, lookPath(name), arg...)
	c.Env = append(os.Environ(), "HOME="+filepath.Join(h.Dir, "home"), "PATH="+searchPath())
	c.Dir = "/"
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	return &Cmd{c, h}
}

// Start is exec.Cmd's, on the host.
func (c *Cmd) Start() error { return c.host.Do(c.Cmd.Start) }

// Run is exec.Cmd's, on the host.
func (c *Cmd) Run() error {
	if err := c.Start(); err != nil {
		return err
	}
	return c.Wait()
}

// Output is exec.Cmd's, on the host; an error carries what the program wrote to stderr.
func (c *Cmd) Output() ([]byte, error) {
	var out, errOut bytes.Buffer
	c.Stdout, c.Stderr = &out, &errOut
	err := c.Run()
	if err != nil && errOut.Len() > 0 {
		err = fmt.Errorf("%w: %s", err, strings.TrimSpace(errOut.String()))
	}
	return out.Bytes(), err
}

// CombinedOutput is exec.Cmd's, on the host.
func (c *Cmd) CombinedOutput() ([]byte, error) {
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	err := c.Run()
	return out.Bytes(), err
}

// Sh runs a shell script on the host, and returns its output. An error says what it printed.
func (h *Host) Sh(ctx context.Context, script string) (string, error) {
	out, err := h.Command(ctx, "/bin/sh", "-ec", script).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("on %s: %s: %w: %s", h.Name, script, err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}

// Enter is the command line that runs what follows it on the host from outside of this process.
func (h *Host) Enter() []string {
	task := fmt.Sprintf("/proc/%d/task/%d/ns/", os.Getpid(), h.tid)
	return []string{"nsenter", "--net=" + task + "net", "--mount=" + task + "mnt", "--uts=" + task + "uts",
		"env", "HOME=" + filepath.Join(h.Dir, "home")}
}

// searchPath is $PATH with the directories where Debian keeps what only root may run.
func searchPath() string {
	return os.Getenv("PATH") + ":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"
}

// lookPath is exec.LookPath over searchPath; what it can't find it returns as it is, for Start to report.
func lookPath(name string) string {
	if strings.Contains(name, "/") {
		return name
	}
	for _, dir := range filepath.SplitList(searchPath()) {
		p := filepath.Join(dir, name)
		if st, err := os.Stat(p); err == nil && !st.IsDir() && st.Mode()&0o111 != 0 {
			return p
		}
	}
	return name
}
