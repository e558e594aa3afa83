package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A machine is a virtual one, and what it has told.
type machine struct {
	cmd *exec.Cmd

	mu                      sync.Mutex
	first, now, most, whole sample
	wrong                   []string
}

// boot starts the machine: the kernel, and in memory its modules, this program as the first process, and the
// daemon.
func (c *conductor) boot(config string) (*machine, error) {
	image := filepath.Join(c.dir, "initramfs")
	if err := c.pack(image, config); err != nil {
		return nil, fmt.Errorf("pack the initramfs: %w", err)
	}
	console, err := os.Create(c.console)
	if err != nil {
		return nil, err
	}
	m := &machine{cmd: exec.Command("qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", fmt.Sprint(c.mb),
		"-nographic", "-no-reboot", "-nic", "tap,ifname=edge0,script=no,downscript=no,model=virtio-net-pci",
		"-kernel", c.kernel, "-initrd", image, "-append", "console=ttyS0 quiet panic=-1 net.ifnames=0 "+c.parameters)}
	m.cmd.Stderr = console
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	out, err := m.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := m.cmd.Start(); err != nil {
		return nil, err
	}
	go m.listen(out, console)
	for deadline := time.Now().Add(2 * time.Minute); m.last().Total == 0; time.Sleep(100 * time.Millisecond) {
		if wrong := m.trouble(); len(wrong) > 0 || time.Now().After(deadline) {
			return nil, fmt.Errorf("the machine does not start: %s; its console: %s", strings.Join(wrong, "; "), c.console)
		}
	}
	return m, nil
}

// listen notes what the machine tells on its console, and keeps all of that in to.
func (m *machine) listen(console io.Reader, to io.WriteCloser) {
	defer to.Close()
	for s := bufio.NewScanner(console); s.Scan(); {
		line := strings.TrimRight(s.Text(), "\r")
		fmt.Fprintln(to, line)
		_, line, ours := strings.Cut(line, mark)
		if !ours {
			continue
		}
		what, text, _ := strings.Cut(line, " ")
		m.mu.Lock()
		switch what {
		case "before", "sample":
			var now sample
			if json.Unmarshal([]byte(text), &now) != nil {
				break // somebody else wrote between
			}
			m.now, m.most, m.whole = now, more(m.most, now), more(m.whole, now)
			if what == "before" {
				m.first = now
			}
		default:
			if len(m.wrong) < 5 {
				m.wrong = append(m.wrong, what+": "+text)
			}
		}
		m.mu.Unlock()
	}
	m.mu.Lock()
	m.wrong = append(m.wrong, "the machine has ended")
	m.mu.Unlock()
}

// more is the larger of each.
func more(a, b sample) sample {
	return sample{max(a.Total, b.Total), max(a.Free, b.Free), max(a.Taken, b.Taken), max(a.Slab, b.Slab), max(a.RSS, b.RSS), max(a.TCP, b.TCP),
		max(a.Socket, b.Socket), max(a.CPU, b.CPU), max(a.Short, b.Short), a.Now || b.Now}
}

func (m *machine) look(what *sample) sample {
	m.mu.Lock()
	defer m.mu.Unlock()
	return *what
}

func (m *machine) before() sample    { return m.look(&m.first) }
func (m *machine) last() sample      { return m.look(&m.now) }
func (m *machine) mostOfAll() sample { return m.look(&m.whole) }

// mostSince is the most of each since the last call with forget.
func (m *machine) mostSince(forget bool) sample {
	m.mu.Lock()
	defer m.mu.Unlock()
	if forget {
		m.most = sample{}
	}
	return m.most
}

// trouble is what went wrong.
func (m *machine) trouble() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.wrong
}

// waited is for how long the machine's processor, a thread here, has waited for one of ours.
func (m *machine) waited() time.Duration {
	var most, waited int64
	all, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", m.cmd.Process.Pid))
	for _, file := range all {
		var ran, wait int64
		if b, err := os.ReadFile(file); err == nil {
			fmt.Sscan(string(b), &ran, &wait)
		}
		if ran > most { // the emulation is what takes most
			most, waited = ran, wait
		}
	}
	return time.Duration(waited)
}

// pack writes an archive of what the machine has: see the kernel's Documentation/driver-api/early-userspace.
func (c *conductor) pack(image, config string) (err error) {
	f, err := os.Create(image)
	if err != nil {
		return err
	}
	defer f.Close()
	w := bufio.NewWriter(f)
	inode := 0
	add := func(name string, mode uint32, content []byte) {
		inode++
		fmt.Fprintf(w, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00", inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0, name)
		w.Write(make([]byte, (4-(110+len(name)+1)%4)%4))
		w.Write(content)
		w.Write(make([]byte, (4-len(content)%4)%4))
	}
	for _, dir := range []string{"modules", "dev", "proc", "sys", "run", "etc", "tmp"} {
		add(dir, unix.S_IFDIR|0o755, nil)
	}
	files := map[string]string{"init": "/proc/self/exe", "tailsplice": c.daemon}
	modules, err := os.ReadDir(c.modules)
	if err != nil {
		return err
	}
	for _, e := range modules {
		files["modules/"+e.Name()] = filepath.Join(c.modules, e.Name())
	}
	for name, path := range files {
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		add(name, unix.S_IFREG|0o755, content)
	}
	add("config.yaml", unix.S_IFREG|0o644, []byte(config))
	add("TRAILER!!!", 0, nil)
	return w.Flush()
}
