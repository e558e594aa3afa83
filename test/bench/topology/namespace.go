package topology

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// prefix begins the name of everything that a run makes outside of its own processes.
const prefix = "ts-bench-"

// namespace is a Host that is only a network namespace: one locked thread in it, by which its programs are
// started.
type namespace struct {
	name string // under /run/netns
	jobs chan func()
}

// newNamespace makes PREFIX-PID-name.
func newNamespace(name string) (*namespace, error) {
	n := &namespace{name: fmt.Sprintf("%s%d-%s", prefix, os.Getpid(), name), jobs: make(chan func())}
	if err := command("ip", "netns", "add", n.name); err != nil {
		return nil, err
	}
	ready := make(chan error)
	go n.thread(ready)
	if err := <-ready; err != nil {
		return nil, err
	}
	return n, command("ip", "-n", n.name, "link", "set", "lo", "up")
}

// thread is never unlocked: it dies with its goroutine. Programs that it started get SIGKILL when it does.
func (n *namespace) thread(ready chan<- error) {
	runtime.LockOSThread()
	f, err := os.Open("/run/netns/" + n.name)
	if err == nil {
		err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
		f.Close()
	}
	ready <- err
	if err == nil {
		for job := range n.jobs {
			job()
		}
	}
}

// do runs f in the namespace.
func (n *namespace) do(f func() error) error {
	done := make(chan error)
	n.jobs <- func() { done <- f() }
	return <-done
}

func (n *namespace) Start(c *exec.Cmd) error {
	if c.SysProcAttr == nil {
		c.SysProcAttr = &syscall.SysProcAttr{}
	}
	c.SysProcAttr.Pdeathsig = unix.SIGKILL
	return n.do(c.Start)
}

func (n *namespace) Sysctl(name, value string) error {
	return n.do(func() error {
		return os.WriteFile("/proc/sys/net/"+name, []byte(value), 0)
	})
}

// ip runs ip(8) on the namespace.
func (n *namespace) ip(args string) error {
	return command(append([]string{"ip", "-n", n.name}, strings.Fields(args)...)...)
}

func command(argv ...string) error {
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// reapScript removes a run's namespaces and files when the run has ended, however it has.
const reapScript = `
trap "" INT TERM HUP QUIT
read -r _
for try in 1 2 3 4 5 6 7 8 9 10; do
	left=
	for ns in /run/netns/"$ID"-*; do
		[ -e "$ns" ] || continue
		umount "$ns" 2>/dev/null; rm -f "$ns" 2>/dev/null || left=1
	done
	rm -rf --one-file-system "$DIR" 2>/dev/null || left=1
	[ "$left" ] || break
	sleep 0.1
done
`

// Run is what a run leaves in the machine while it lives: Dir, and namespaces.
type Run struct {
	Dir    string
	reaper *exec.Cmd
	pipe   io.Closer
}

// NewRun sweeps what killed runs left, and makes a directory. A shell in a session of its own waits for the
// end of this process and then removes everything.
func NewRun() (*Run, error) {
	if err := sweep(); err != nil {
		return nil, err
	}
	id := fmt.Sprintf("%s%d", prefix, os.Getpid())
	r := &Run{Dir: filepath.Join(os.TempDir(), id)}
	pr, pw, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer pr.Close()
	r.pipe = pw
	r.reaper = exec.Command("/bin/sh", "-c", reapScript)
	r.reaper.Env = append(os.Environ(), "ID="+id, "DIR="+r.Dir)
	r.reaper.Stdin, r.reaper.Dir = pr, "/"
	r.reaper.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := r.reaper.Start(); err != nil {
		return nil, fmt.Errorf("start the reaper: %w", err)
	}
	return r, os.Mkdir(r.Dir, 0o755)
}

// Close removes everything.
func (r *Run) Close() error {
	r.pipe.Close()
	return r.reaper.Wait()
}

// sweep removes what runs left whose process is gone and whose reaper was killed as well.
func sweep() error {
	spaces, _ := filepath.Glob("/run/netns/" + prefix + "*")
	dirs, _ := filepath.Glob(filepath.Join(os.TempDir(), prefix+"*"))
	var err error
	for _, name := range append(spaces, dirs...) {
		var pid int
		if _, e := fmt.Sscanf(filepath.Base(name), prefix+"%d", &pid); e != nil || alive(pid) {
			continue
		}
		if strings.HasPrefix(name, "/run/netns/") {
			err = errors.Join(err, command("ip", "netns", "del", filepath.Base(name)))
		} else {
			err = errors.Join(err, os.RemoveAll(name))
		}
	}
	return err
}

// alive says whether the process is a run of this tool; ids are used again.
func alive(pid int) bool {
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	self, _ := os.Executable()
	return err == nil && filepath.Base(strings.TrimSuffix(exe, " (deleted)")) == filepath.Base(self)
}
