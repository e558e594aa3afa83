package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A sample is what takes memory in the machine, in bytes.
type sample struct {
	Total  int64
	Free   int64
	Taken  int64 // what is neither free nor a copy of a file
	Slab   int64
	RSS    int64 // the daemon's
	TCP    int64 // what sockets hold
	Socket int64 // sockets of TCP: how many
	CPU    int64 // what the daemon has used, in ms
	// how long the kernel has been short of memory for TCP, in ms: since boot, of the times that have ended
	Short int64
	Now   bool // it is short
}

// mark begins the lines of the console that the conductor reads.
const mark = "@@ "

// guest is the first process of the machine. It starts the daemon and tells what happens, until the machine
// is ended.
func guest() {
	if err := startMachine(); err != nil {
		fmt.Println(mark+"failed", err)
		time.Sleep(time.Second)
		unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	}
	tell("before", takeSample(0))
	daemon := exec.Command("/tailsplice", "run", "--config", "/config.yaml")
	log, err := daemon.StderrPipe()
	if err == nil {
		daemon.Stdout = daemon.Stderr
		err = daemon.Start()
	}
	if err != nil {
		fmt.Println(mark+"failed", err)
		return
	}
	// not as this process
	os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", daemon.Process.Pid), []byte("0"), 0)
	// of the log, in this second: the console is slow
	var lines atomic.Int64
	go func() {
		for s := bufio.NewScanner(log); s.Scan(); {
			if lines.Add(1) <= 20 {
				fmt.Println(s.Text())
			}
		}
	}()
	go watchKernel()
	go func() {
		err := daemon.Wait()
		fmt.Println(mark+"died", err)
	}()
	for {
		lines.Store(0)
		tell("sample", takeSample(daemon.Process.Pid))
		time.Sleep(time.Second)
	}
}

func tell(what string, s sample) {
	b, _ := json.Marshal(s)
	fmt.Println(mark+what, string(b))
}

// startMachine does what an operating system would have done by now.
func startMachine() error {
	for _, m := range []struct{ what, where string }{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/run"}, {"bpf", "/sys/fs/bpf"}} {
		os.MkdirAll(m.where, 0o755)
		if err := unix.Mount(m.what, m.where, m.what, 0, ""); err != nil && err != unix.EBUSY {
			return fmt.Errorf("mount %s: %w", m.what, err)
		}
	}
	os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
	order, err := os.ReadFile("/modules/order")
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(string(order)) {
		f, err := os.Open("/modules/" + name)
		if err != nil {
			return err
		}
		if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
			return fmt.Errorf("load %s: %w", name, err)
		}
		f.Close()
	}
	os.RemoveAll("/modules")
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		eth, err := netlink.LinkByName("eth0")
		if err != nil {
			if time.Now().After(deadline) {
				return err
			}
			continue
		}
		addr, err := netlink.ParseAddr(edgeAddr + "/16")
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(eth, addr); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(eth); err != nil {
			return err
		}
		break
	}
	os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("1024 65535"), 0)
	// As many files as systemd's unit gives it, and a machine of this size ever needs.
	limit := unix.Rlimit{Cur: 1 << 19, Max: 1 << 19}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("raise the limit of open files: %w", err)
	}
	_, err = net.Interfaces()
	return err
}

// watchKernel tells what the kernel says when it is short of memory.
func watchKernel() {
	f, err := os.Open("/dev/kmsg")
	if err != nil {
		return
	}
	b := make([]byte, 8<<10)
	for {
		n, err := f.Read(b)
		if err != nil {
			if err == syscall.EPIPE { // lines were lost
				continue
			}
			return
		}
		if text := string(b[:n]); strings.Contains(text, "Out of memory") || strings.Contains(text, "oom-kill") ||
			strings.Contains(text, "out of memory") || strings.Contains(text, "allocation failure") {
			_, text, _ = strings.Cut(text, ";")
			text, _, _ = strings.Cut(text, "\n")
			fmt.Println(mark+"kernel", text)
		}
	}
}

// takeSample looks at the machine, and at the process pid.
func takeSample(pid int) sample {
	info := fields("/proc/meminfo", ":")
	s := sample{Total: info["MemTotal"] << 10, Free: info["MemFree"] << 10, Slab: info["Slab"] << 10}
	// Cached counts the files of the initramfs as well, which no machine could give back: they are the same
	// before and after, and only differences count.
	s.Taken = s.Total - s.Free - (info["Buffers"]+info["Cached"])<<10
	if pid > 0 {
		s.RSS = fields(fmt.Sprintf("/proc/%d/status", pid), ":")["VmRSS"] << 10
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil {
			if _, after, ok := strings.Cut(string(b), ") "); ok {
				if f := strings.Fields(after); len(f) > 13 {
					var user, system int64
					fmt.Sscan(f[11]+" "+f[12], &user, &system)
					s.CPU = (user + system) * 10
				}
			}
		}
	}
	if b, err := os.ReadFile("/proc/net/sockstat"); err == nil {
		_, tcp, _ := strings.Cut(string(b), "\nTCP: ")
		tcp, _, _ = strings.Cut(tcp, "\n")
		var inuse, orphan, tw, alloc, mem int64
		fmt.Sscanf(tcp, "inuse %d orphan %d tw %d alloc %d mem %d", &inuse, &orphan, &tw, &alloc, &mem)
		s.Socket, s.TCP = alloc, mem*int64(os.Getpagesize())
	}
	s.Short = tcpExt("TCPMemoryPressuresChrono")
	s.Now = isTCPShort()
	return s
}

// isTCPShort reports whether the kernel is short of memory for TCP: its column press.
func isTCPShort() bool {
	b, _ := os.ReadFile("/proc/net/protocols")
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && f[0] == "TCP" {
			return f[4] == "yes"
		}
	}
	return false
}

// tcpExt is a counter of the kernel's TCP.
func tcpExt(name string) (n int64) {
	b, _ := os.ReadFile("/proc/net/netstat")
	names, rest, _ := strings.Cut(string(b), "\n")
	values, _, _ := strings.Cut(rest, "\n")
	v := strings.Fields(values)
	if i := slices.Index(strings.Fields(names), name); i >= 0 && i < len(v) {
		fmt.Sscan(v[i], &n)
	}
	return n
}

// fields are the numbers of a file of lines "NAME: NUMBER".
func fields(file, colon string) map[string]int64 {
	all := map[string]int64{}
	b, _ := os.ReadFile(file)
	for line := range strings.Lines(string(b)) {
		if name, rest, ok := strings.Cut(line, colon); ok {
			var n int64
			if _, err := fmt.Sscan(rest, &n); err == nil {
				all[name] = n
			}
		}
	}
	return all
}
