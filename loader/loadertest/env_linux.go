package loadertest

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/tailsplice/tailsplice/tcpsock"
	"golang.org/x/sys/unix"
)

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) { w.t.Logf("%s", b); return len(b), nil }

// LogTo gives a log that t shows.
func LogTo(t testing.TB) *slog.Logger { return slog.New(slog.NewTextHandler(testWriter{t}, nil)) }

// InOwnNetwork runs the rest of the test in a process of its own, in a network namespace of its own that ends
// with it, with TCP buffers of at most 1 MiB. It returns true there.
func InOwnNetwork(t *testing.T) bool {
	t.Helper()
	if !InNewNetwork(t) {
		return false
	}
	for name, value := range map[string]string{
		"tcp_rmem": "4096 131072 1048576", "tcp_wmem": "4096 65536 1048576",
	} {
		Must(t, os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(value), 0))
	}
	return true
}

// InNewNetwork is InOwnNetwork with the TCP buffers that the kernel begins with.
func InNewNetwork(t *testing.T) bool {
	t.Helper()
	if os.Getenv("TS_LDR_OWN_NETWORK") == t.Name() {
		Must(t, loopbackUp())
		return true
	}
	NeedRoot(t)
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), "TS_LDR_OWN_NETWORK="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Error(err)
	}
	return false
}

// NeedRoot skips the test without root.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		lacks(t, "root")
	}
}

// Must fails the test for an error.
func Must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r)
}

// OwnBPFFS mounts a BPF file system for one test, in which nobody else looks for what is left over.
func OwnBPFFS(t testing.TB, mode string) string {
	t.Helper()
	NeedRoot(t)
	dir := t.TempDir()
	Must(t, unix.Mount("bpf", dir, "bpf", 0, "mode="+mode))
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// lacks skips a test that can't be made here, or fails it where all has to be.
func lacks(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatal("needs " + what)
	}
	t.Skip("needs " + what)
}

// WaitFor waits until what is so.
func WaitFor(t testing.TB, what func() bool, name string) {
	t.Helper()
	for end := time.Now().Add(Patience); !what(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", name)
		}
	}
}

// AtSoak is big where RELAYTEST=soak asks for what a release has to pass.
func AtSoak(small, big int) int {
	if os.Getenv("RELAYTEST") == "soak" {
		return big
	}
	return small
}

// Zeroes are without end.
type Zeroes struct{}

func (Zeroes) Read(b []byte) (int, error) { return len(b), nil }

// Alone runs f on one processor, where nothing else that is not as urgent runs meanwhile.
func Alone(t *testing.T, f func()) {
	t.Helper()
	runtime.LockOSThread() // a thread with which this ends early ends, too
	const normal, fifo = unix.SCHED_NORMAL, unix.SCHED_FIFO
	policy := func(p, priority uint32) error {
		return unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: p, Priority: priority}, 0)
	}
	if err := policy(fifo, 1); errors.Is(err, unix.EPERM) {
		lacks(t, "the right to run with SCHED_FIFO: CAP_SYS_NICE or `ulimit -r 1`, and real time for its cgroup "+
			"where the kernel divides that among them (cgroup v1's cpu.rt_runtime_us)")
	} else {
		Must(t, err)
	}
	var one, was unix.CPUSet
	Must(t, unix.SchedGetaffinity(0, &was))
	for i := range 1024 {
		if was.IsSet(i) {
			one.Set(i)
			break
		}
	}
	Must(t, unix.SchedSetaffinity(0, &one))
	f()
	Must(t, errors.Join(policy(normal, 0), unix.SchedSetaffinity(0, &was)))
	runtime.UnlockOSThread()
}

// WriteRaw writes without Go's poller.
func WriteRaw(t *testing.T, c *net.TCPConn, b []byte) {
	t.Helper()
	raw, err := c.SyscallConn()
	Must(t, err)
	n := 0
	Must(t, errors.Join(raw.Control(func(fd uintptr) { n, err = unix.Write(int(fd), b) }), err))
	if n != len(b) {
		t.Fatalf("%d bytes of %d were taken", n, len(b))
	}
}

// Attached is how many sockops programs are attached to a cgroup.
func Attached(t testing.TB, dir string) int {
	t.Helper()
	d, err := os.Open(dir)
	Must(t, err)
	defer d.Close()
	r, err := link.QueryPrograms(link.QueryOptions{Target: int(d.Fd()), Attach: ebpf.AttachCGroupSockOps})
	Must(t, err)
	return len(r.Programs)
}

// HoldMemory has TCP hold some until the test ends: bytes that nobody reads. It returns when the kernel
// counts them, which each CPU does by the megabyte: where there is little traffic, its sum may be 0 for
// long.
func HoldMemory(t testing.TB) {
	t.Helper()
	const least = 16 << 20
	for held := range 1000 {
		if used, _ := tcpsock.Memory("/proc"); held >= 32 && used > least {
			return
		}
		writer, reader := Connect(t, "tcp4")
		t.Cleanup(func() { writer.Close(); reader.Close() })
		Must(t, writer.SetWriteDeadline(time.Now().Add(100*time.Millisecond)))
		_, err := io.Copy(writer, io.LimitReader(Zeroes{}, 1<<20))
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
	}
	t.Fatal("TCP holds no memory")
}
