package unit

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

const troubleConfig = `
listeners:
  - { name: web, listen: [":9100"], mode: tcp, default: { forward: "TARGET" } }
  - { name: pages, listen: [":9101"], mode: http, access_log: { file: /var/log/tailsplice/access.log }, default: { reject: true } }
control: { metrics: "127.0.0.1:9464", health: "127.0.0.1:9465" }
`

// writable are the folders in which the daemon may write. They are small here.
var writable = []string{"/run/tailsplice", "/var/lib", "/var/log"}

// TestTrouble: the unit as it is shipped, with nothing added, goes on through what an operator may meet: each of its
// flows lives, and new ones are served.
func TestTrouble(t *testing.T) {
	options := lab.Options{NoTailnet: true, NoAnycast: true, NoDocker: true}
	lab.Require(t, options, "systemd-nspawn", "make", "nsenter", "pgrep")
	w := lab.Start(t, options)
	m := boot(t, w.EdgeA)
	target := net.JoinHostPort(w.Client.IP4.String(), "7000")
	x := &trouble{crash: &crash{machine: m, world: w}, config: strings.Replace(troubleConfig, "TARGET", target, 1),
		program: filepath.Join(m.host.Dir, "install/usr/local/bin/tailsplice")}
	m.write(t, "etc/tailsplice/tailsplice.yaml", x.config)
	sendBack(t, w.Client, "7000")
	for _, dir := range writable {
		m.run(t, "mkdir", "-p", dir)
		m.run(t, "mount", "-t", "tmpfs", "-o", "size=256k,mode=755", "full", dir)
	}
	m.restart(t)
	for _, c := range []struct {
		name string
		does func(t *testing.T)
	}{
		{"many crashes", x.crashesOften},
		{"control socket", x.losesSocket},
		{"reload of another program", x.reloads},
		{"disk full", x.isFull},
		{"no memory", x.lacksMemory},
	} {
		t.Run(c.name, func(t *testing.T) {
			x.pid, x.idle = x.main(t), nil
			for range 10 {
				x.idle = append(x.idle, x.dial(t))
			}
			time.Sleep(keptWait)
			c.does(t)
		})
	}
}

// keptWait is how long it takes at most until flows are kept for the time after a crash.
const keptWait = 3 * time.Second

// trouble is a daemon that has it, and flows that are to live on.
type trouble struct {
	*crash
	config  string
	program string // its file, as seen from outside
	idle    []net.Conn
	turn    int64
}

func (x *trouble) dial(t *testing.T) net.Conn {
	t.Helper()
	c, err := x.world.Client.Dial(t.Context(), "tcp4", net.JoinHostPort(x.host.IP4.String(), "9100"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(10 * time.Minute))
	if err := numbered(c, 1); err != nil {
		t.Fatal(err)
	}
	return c
}

// goesOn checks that all flows do, that new ones are served, and that the unit is up.
func (x *trouble) goesOn(t *testing.T) {
	t.Helper()
	x.turn++
	for i, c := range x.idle {
		if err := numbered(c, x.turn); err != nil {
			t.Errorf("flow %d: %v", i, err)
		}
	}
	if err := x.exchange(t.Context(), 9100); err != nil {
		t.Errorf("a new flow: %v", err)
	}
	if state := x.property(t, "ActiveState") + " " + x.property(t, "SubState"); state != "active running" {
		t.Errorf("the unit is %s", state)
	}
	if t.Failed() {
		t.Fatalf("the journal:\n%s", x.journal(t))
	}
}

func (x *trouble) property(t *testing.T, name string) string {
	t.Helper()
	return x.run(t, "systemctl", "show", "--value", "--property="+name, service)
}

// crashesOften kills the daemon as soon as it serves, more often than systemd would start a unit by default, which is
// 5 times in 10 s.
func (x *trouble) crashesOften(t *testing.T) {
	if limit := x.property(t, "StartLimitIntervalUSec"); limit != "0" {
		t.Errorf("the interval in which starts are bounded is %s", limit)
	}
	began, times := time.Now(), 0
	for ; times < 8; times++ {
		time.Sleep(700 * time.Millisecond) // the flows are kept again by then
		x.kills(t, "KILL")
		x.goesOn(t)
	}
	t.Logf("%d crashes in %v", times, time.Since(began).Round(time.Millisecond))
}

// losesSocket removes the file of the control socket.
func (x *trouble) losesSocket(t *testing.T) {
	x.run(t, "rm", "/run/tailsplice/control.sock")
	x.eventually(t, "tailsplice status")
	x.run(t, "systemctl", "reload", service)
	x.goesOn(t)
	x.run(t, "rm", "/run/tailsplice/control.sock")
	x.eventually(t, "tailsplice status")
	x.run(t, "tailsplice", "upgrade")
	x.changes(t, "upgrade")
	x.goesOn(t)
	time.Sleep(keptWait)
	x.kills(t, "KILL") // the new socket is kept
	x.goesOn(t)
	if n := x.says(t, "is kept: connections may be refused"); n > 0 {
		t.Errorf("%d times something was not kept:\n%s", n, x.journal(t))
	}
}

// install puts another file in the program's place, as packages do.
func (x *trouble) install(t *testing.T, content []byte) {
	t.Helper()
	if err := os.WriteFile(x.program+".new", content, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(x.program+".new", x.program); err != nil {
		t.Fatal(err)
	}
}

// reloads has systemd reload the unit after its program has changed.
func (x *trouble) reloads(t *testing.T) {
	good, err := os.ReadFile(x.program)
	if err != nil {
		t.Fatal(err)
	}
	x.run(t, "systemctl", "reload", service)
	if pid := x.main(t); pid != x.pid {
		t.Errorf("a reload of the same program: process %s serves, want %s", pid, x.pid)
	}
	restarts := x.property(t, "NRestarts")

	x.install(t, []byte("#!/bin/sh\necho I will not >&2\nexit 3\n"))
	out, err := x.command(t.Context(), "systemctl", "reload", service).CombinedOutput()
	if err == nil {
		t.Errorf("a reload of a program that does not start: %s", out)
	}
	x.install(t, good)
	if pid := x.main(t); pid != x.pid || !strings.Contains(x.journal(t), "I will not") {
		t.Errorf("after that process %s serves, want %s, and the reason in the journal:\n%s", pid, x.pid, x.journal(t))
	}
	x.goesOn(t)

	x.write(t, "etc/tailsplice/tailsplice.yaml", x.config+"limits: { connections_per_source: 1000 }\n")
	x.run(t, "systemctl", "reload", service)
	x.changes(t, "a reload of another program")
	x.goesOn(t)
	x.eventually(t, "! tailsplice status | grep -i older")
	x.goesOn(t)
	x.run(t, "systemctl", "reload", service)
	if pid, now := x.main(t), x.property(t, "NRestarts"); pid != x.pid || now != restarts {
		t.Errorf("another reload: process %s serves, want %s; %s restarts, want %s", pid, x.pid, now, restarts)
	}
	if n := x.says(t, "Got notification message from PID"); n > 0 {
		t.Errorf("systemd has refused %d messages:\n%s", n, x.journal(t))
	}
}

// isFull has an upgrade, a reload and a crash where nothing can be written.
func (x *trouble) isFull(t *testing.T) {
	for _, dir := range writable {
		x.run(t, "sh", "-c", "dd if=/dev/zero of="+dir+"/fill bs=4k 2>/dev/null; test -s "+dir+"/fill && ! echo x 2>/dev/null >"+dir+"/x")
	}
	x.goesOn(t)
	out, err := x.command(t.Context(), "tailsplice", "upgrade").CombinedOutput()
	t.Logf("an upgrade: %v: %s", err, out)
	if err == nil {
		x.changes(t, "upgrade")
	}
	x.goesOn(t)
	out, err = x.command(t.Context(), "systemctl", "reload", service).CombinedOutput()
	t.Logf("a reload: %v: %s", err, out)
	x.goesOn(t)
	x.run(t, "rm", "/run/tailsplice/control.sock")
	x.eventually(t, "tailsplice status")
	for _, dir := range writable {
		x.run(t, "rm", dir+"/fill")
	}
	x.run(t, "tailsplice", "upgrade")
	x.changes(t, "upgrade")
	x.goesOn(t)
}

// lacksMemory has an upgrade for which there is no memory.
func (x *trouble) lacksMemory(t *testing.T) {
	if policy := x.property(t, "OOMPolicy"); policy != "continue" {
		t.Errorf("OOMPolicy is %s", policy)
	}
	lift := x.limitMemory(t)
	defer lift()
	x.write(t, "etc/tailsplice/eats", "#!/bin/sh\nexec tail /dev/zero\n")
	x.run(t, "chmod", "a+x", "/etc/tailsplice/eats")
	out, err := x.command(t.Context(), "tailsplice", "upgrade", "--binary", "/etc/tailsplice/eats").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "it ended") {
		t.Errorf("an upgrade without memory: %v: %s", err, out)
	}
	if pid := x.main(t); pid != x.pid {
		t.Errorf("process %s serves, want %s", pid, x.pid)
	}
	time.Sleep(time.Second) // systemd hears of it by a file of the cgroup
	x.goesOn(t)
}

// limitMemory bounds what the unit may have beside what it has: by systemd where it has the memory controller, and else
// by the hierarchy that has it outside. There systemd hears of no kill.
func (x *trouble) limitMemory(t *testing.T) (lift func()) {
	t.Helper()
	if controllers := x.run(t, "cat", "/sys/fs/cgroup/cgroup.controllers"); strings.Contains(controllers, "memory") {
		set := func(max string) { x.run(t, "systemctl", "set-property", "--runtime", service, "MemoryMax="+max) }
		var has int
		fmt.Sscan(x.property(t, "MemoryCurrent"), &has)
		set(fmt.Sprint(has + 32<<20))
		return func() { set("infinity") }
	}
	t.Log("systemd has no memory controller here: OOMPolicy= is not put to the test")
	dir := fmt.Sprintf("/sys/fs/cgroup/memory/tailsplice-test-%d", os.Getpid())
	if err := os.Mkdir(dir, 0o755); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("no cgroup can bound memory: %v", err)
		}
		t.Skipf("no cgroup can bound memory: %v", err)
	}
	write := func(name, text string) error { return os.WriteFile(filepath.Join(dir, name), []byte(text), 0) }
	out, err := exec.Command("sh", "-c", "for p in /proc/[0-9]*; do grep -q \"^NSpid:.*[[:space:]]"+x.pid+
		"$\" $p/status 2>/dev/null && [ $(readlink $p/ns/pid) = $(readlink /proc/"+x.leader+"/ns/pid) ] && echo ${p#/proc/}; done; :").Output()
	pid := strings.TrimSpace(string(out)) // as seen from outside
	statm, err2 := os.ReadFile("/proc/" + pid + "/statm")
	var size, pages int
	fmt.Sscan(string(statm), &size, &pages)
	// What the daemon has counts for the kernel's choice, and not for the limit: it is the larger one.
	if err = errors.Join(err, err2); err == nil {
		err = errors.Join(write("memory.limit_in_bytes", fmt.Sprint(pages*os.Getpagesize()*9/10)), write("cgroup.procs", pid))
	}
	if err != nil {
		t.Fatalf("%v (process %s)", err, out)
	}
	return func() {
		all, err := os.ReadFile(dir + "/cgroup.procs")
		for pid := range strings.Lines(string(all)) {
			err = errors.Join(err, os.WriteFile("/sys/fs/cgroup/memory/cgroup.procs", []byte(pid), 0))
		}
		if err = errors.Join(err, os.Remove(dir)); err != nil {
			t.Error(err)
		}
	}
}
