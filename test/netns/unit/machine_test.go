package unit

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

const service = "tailsplice.service"

// machine is a systemd in a container that shares a host's network.
type machine struct {
	host     *lab.Host
	root     string // its root folder, as seen from outside
	leader   string // its PID 1, as seen from outside
	standIns string // functions of bash for what a document types and the lab does not have
}

// boot starts what `make install` installs, beside this machine's programs.
func boot(t *testing.T, h *lab.Host) *machine {
	t.Helper()
	m := &machine{host: h, root: filepath.Join(h.Dir, "root")}
	m.install(t)
	m.start(t, "--bind-ro=/usr", "--bind-ro="+filepath.Join(h.Dir, "install/usr/local")+":/usr/local")
	m.run(t, "systemd-sysusers", "/usr/local/lib/sysusers.d/tailsplice.conf") // as make install does where it may
	return m
}

// start boots the root folder, without any service of the distribution but the journal. It ends with the
// test.
func (m *machine) start(t *testing.T, flags ...string) {
	t.Helper()
	h := m.host
	groups := newCgroups(t)
	argv := []string{"/bin/sh", "-ec", `for g in $GROUPS_; do echo $$ >$g/cgroup.procs; done; exec "$@"`, "sh",
		"systemd-nspawn", "--boot", "--directory=" + m.root, "--register=no", "--keep-unit",
		"--network-namespace-path=/proc/self/ns/net", "--machine=" + h.Name, "--console=read-only",
		"--resolv-conf=off", "--timezone=off", "--link-journal=no", "--capability=all"}
	argv = append(append(argv, flags...), "systemd.unit=basic.target", "systemd.mask=systemd-modules-load.service")
	p, err := h.StartProcess("systemd", argv, func(c *lab.Cmd) {
		// As on a machine: one hierarchy of cgroups, /proc/sys and /sys that can be written to, and no filter
		// of system calls but the unit's own.
		c.Env = append(c.Env, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1", "SYSTEMD_NSPAWN_API_VFS_WRITABLE=yes", "SYSTEMD_SECCOMP=0",
			"GROUPS_="+strings.Join(groups, " "))
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of the console:\n%s", last(p.Output(), 3000))
		}
		p.Stop(20 * time.Second) // it powers the container off
	})
	deadline := time.Now().Add(2 * time.Minute)
	for {
		if out, err := exec.Command("pgrep", "-P", fmt.Sprint(p.Pid())).Output(); err == nil {
			m.leader = strings.Fields(string(out))[0]
			if out, _ := m.command(t.Context(), "systemctl", "is-system-running").Output(); strings.TrimSpace(string(out)) == "running" {
				break
			}
		}
		if !p.Running() || time.Now().After(deadline) {
			state, _ := m.command(context.Background(), "sh", "-c",
				"systemctl is-system-running; systemctl --no-pager --failed; systemctl --no-pager list-jobs").CombinedOutput()
			t.Fatalf("systemd did not start: %s", state)
		}
		time.Sleep(50 * time.Millisecond)
	}
	m.run(t, "mount", "-t", "bpf", "-o", "mode=700", "bpf", "/sys/fs/bpf") // systemd does it where it isn't in a container
}

// install makes the root folder.
func (m *machine) install(t *testing.T) {
	t.Helper()
	repo, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"usr", "etc/systemd/system", "etc/tailsplice", "var", "run", "tmp", "proc", "sys", "dev", "root"} {
		if err := os.MkdirAll(filepath.Join(m.root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := os.Symlink("usr/"+d, filepath.Join(m.root, d)); err != nil {
			t.Fatal(err)
		}
	}
	m.write(t, "etc/os-release", "ID=lab\n")
	m.write(t, "etc/machine-id", strings.Repeat("7a11", 8)+"\n")
	m.write(t, "etc/passwd", "root:x:0:0::/root:/bin/sh\n")
	m.write(t, "etc/group", "root:x:0:\n")
	wanted, _ := filepath.Glob("/usr/lib/systemd/system/*.target.wants/*")
	for _, unit := range wanted {
		if name := filepath.Base(unit); !strings.HasPrefix(name, "systemd-journald") {
			os.Symlink("/dev/null", filepath.Join(m.root, "etc/systemd/system", name)) // some are wanted twice
		}
	}
	onThisMachine(t, repo, block(t, "make build && sudo make install"),
		"MAKEFLAGS=DESTDIR="+filepath.Join(m.host.Dir, "install"))
}

// newCgroups makes a cgroup in each hierarchy that systemd-nspawn makes cgroups in; it leaves them behind.
func newCgroups(t *testing.T) (dirs []string) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	groups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	own := map[string]string{}
	for line := range strings.Lines(string(groups)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		own[f[1]] = f[2]
	}
	for line := range strings.Lines(string(mounts)) {
		place, fs, _ := strings.Cut(strings.TrimSpace(line), " - ")
		hierarchy := ""
		switch {
		case strings.HasPrefix(fs, "cgroup2 "):
		case strings.HasPrefix(fs, "cgroup ") && strings.Contains(fs, "name=systemd"):
			hierarchy = "name=systemd"
		default:
			continue
		}
		dir := filepath.Join(strings.Fields(place)[4], own[hierarchy], fmt.Sprintf("tailsplice-test-%d", os.Getpid()))
		if err := os.Mkdir(dir, 0o755); os.IsExist(err) {
			continue // the same hierarchy is mounted twice
		} else if err != nil {
			t.Fatal(err)
		}
		dirs = append(dirs, dir)
		t.Cleanup(func() {
			var below []string
			filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					below = append([]string{path}, below...) // the inner ones first
				}
				return nil
			})
			for _, d := range below {
				if err := os.Remove(d); err != nil {
					t.Error(err)
				}
			}
		})
	}
	return dirs
}

func (m *machine) write(t *testing.T, name, text string) {
	t.Helper()
	name = filepath.Join(m.root, name)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// command prepares a command that runs in the container, as its root, outside of any unit.
func (m *machine) command(ctx context.Context, arg ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "nsenter", append([]string{"--target=" + m.leader, "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup",
		"--root", "--wd", "env", "-i", "PATH=/usr/local/bin:/usr/sbin:/usr/bin"}, arg...)...)
}

func (m *machine) run(t *testing.T, arg ...string) string {
	t.Helper()
	out, err := m.command(t.Context(), arg...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", arg, err, out)
	}
	return strings.TrimSpace(string(out))
}

// restart starts the daemon anew, and waits until it says that it is ready.
func (m *machine) restart(t *testing.T) {
	t.Helper()
	m.run(t, "systemctl", "daemon-reload")
	if out, err := m.command(t.Context(), "systemctl", "restart", service).CombinedOutput(); err != nil {
		m.command(context.Background(), "systemctl", "stop", service).Run()
		t.Fatalf("it does not start: %v: %s\n%s", err, out, m.journal())
	}
}

func (m *machine) journal() string {
	out, _ := m.command(context.Background(), "journalctl", "--unit="+service, "--output=cat", "--no-pager", "--lines=20").CombinedOutput()
	return last(string(out), 6000)
}

// datapath says what the one flow of a listener goes by, as `tailsplice flows` does.
func (m *machine) datapath(t *testing.T, listener string) string {
	t.Helper()
	var flows []struct{ Listener, Datapath string }
	out := m.run(t, "tailsplice", "flows", "--json")
	if err := json.Unmarshal([]byte(out), &flows); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	found := ""
	for _, f := range flows {
		if f.Listener == listener {
			found += f.Datapath
		}
	}
	return found
}

func last(s string, n int) string { return s[max(0, len(s)-n):] }
