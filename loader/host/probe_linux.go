package host

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"
)

// Probe looks at what the sockmap datapath needs of this machine, for people: it changes nothing. bpffs gives
// what there is to say about pins, to a process that may load programs or not.
func Probe(bpffs func(privileged bool) Finding) []Finding {
	privileged := Capable(unix.CAP_SYS_ADMIN) || Capable(unix.CAP_BPF) && Capable(unix.CAP_NET_ADMIN)
	return []Finding{
		probeKernel(),
		probeBTF(),
		probeConfig(),
		probeCapabilities(),
		probeFeatures(privileged),
		bpffs(privileged),
		probeCgroup2(),
		probeJIT(),
		probeMemory(),
	}
}

func probeKernel() Finding {
	f := Finding{Name: "kernel", State: StateOK}
	v, release, err := Kernel()
	f.Detail = release
	if err != nil {
		return f.Degraded(err.Error(), "")
	}
	if v.String() != release {
		f.Detail += " (" + v.String() + ")"
	}
	if why := badKernel(v); why != "" {
		f.State, f.Detail = StateMissing, why
		f.Advice = "upgrade the kernel; flows go through userspace meanwhile"
	}
	return f
}

const vmlinuxBTF = "/sys/kernel/btf/vmlinux"

func probeBTF() Finding {
	f := Finding{Name: "btf", State: StateOK}
	s, err := os.Stat(vmlinuxBTF)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return f.Missing(vmlinuxBTF+" does not exist", "use a kernel that is built with CONFIG_DEBUG_INFO_BTF=y, as all large distributions' are")
	case err != nil:
		return f.Degraded(err.Error(), "")
	}
	f.Detail = fmt.Sprintf("%s, %d KiB", vmlinuxBTF, s.Size()/1024)
	return f
}

// What must be set, and what it is for.
var kernelOptions = []struct{ name, why string }{
	{"CONFIG_BPF_SYSCALL", "loading programs"},
	{"CONFIG_BPF_STREAM_PARSER", "verdicts on sockets"},
	{"CONFIG_DEBUG_INFO_BTF", "finding kernel structures"},
	{"CONFIG_INET", "TCP"},
	{"CONFIG_BPF_JIT", "speed"},
	{"CONFIG_CGROUP_BPF", "local targets"},
}

func probeConfig() Finding {
	f := Finding{Name: "kernel config", State: StateOK}
	config, from, err := kernelConfig()
	if err != nil {
		return f.Degraded("could not be read: "+err.Error(), "nothing to do if the self-test passes")
	}
	var lacking []string
	for _, o := range kernelOptions {
		if !regexp.MustCompile(`(?m)^` + o.name + `=[ym]$`).Match(config) {
			lacking = append(lacking, fmt.Sprintf("%s (%s)", o.name, o.why))
		}
	}
	if lacking != nil {
		return f.Missing(from+" lacks "+strings.Join(lacking, ", "), "use a kernel that has them")
	}
	f.Detail = from
	return f
}

func kernelConfig() (config []byte, from string, err error) {
	if b, err := os.ReadFile("/proc/config.gz"); err == nil {
		z, err := gzip.NewReader(bytes.NewReader(b))
		if err != nil {
			return nil, "", err
		}
		config, err := io.ReadAll(z)
		return config, "/proc/config.gz", err
	}
	_, release, err := Kernel()
	if err != nil {
		return nil, "", err
	}
	from = "/boot/config-" + release
	config, err = os.ReadFile(from)
	return config, from, err
}

// Capable reports whether the process has a capability in its effective set.
func Capable(capability uint) bool {
	var sets [2]unix.CapUserData
	err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &sets[0])
	return err == nil && sets[capability/32].Effective&(1<<(capability%32)) != 0
}

func probeCapabilities() Finding {
	f := Finding{Name: "capabilities", State: StateOK}
	var lacking []string
	for _, c := range []struct {
		name string
		bit  uint
	}{{"CAP_BPF", unix.CAP_BPF}, {"CAP_PERFMON", unix.CAP_PERFMON}, {"CAP_NET_ADMIN", unix.CAP_NET_ADMIN}, {"CAP_NET_RAW", unix.CAP_NET_RAW}} {
		if !Capable(c.bit) && !(c.bit != unix.CAP_NET_ADMIN && c.bit != unix.CAP_NET_RAW && Capable(unix.CAP_SYS_ADMIN)) {
			lacking = append(lacking, c.name)
		}
	}
	switch {
	case len(lacking) == 1 && lacking[0] == "CAP_NET_RAW":
		return f.Degraded("CAP_NET_RAW is lacking: the self-test can't send an overlapping retransmit", "add it to the unit's AmbientCapabilities")
	case lacking != nil:
		return f.Missing("lacking "+strings.Join(lacking, ", "), "run the daemon as root, or give its unit AmbientCapabilities=CAP_BPF CAP_PERFMON CAP_NET_ADMIN CAP_NET_RAW")
	}
	f.Detail = "CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN, CAP_NET_RAW"
	return f
}

func probeFeatures(privileged bool) Finding {
	f := Finding{Name: "bpf features", State: StateOK}
	if !privileged {
		return f.Degraded("can't be seen without CAP_BPF and CAP_NET_ADMIN", "run doctor as root")
	}
	var lacking []string
	for name, err := range map[string]error{
		"sk_skb programs":       features.HaveProgramType(ebpf.SkSKB),
		"sockmaps":              features.HaveMapType(ebpf.SockMap),
		"ring buffers":          features.HaveMapType(ebpf.RingBuf),
		"bpf_skc_to_tcp_sock":   features.HaveProgramHelper(ebpf.SkSKB, asm.FnSkcToTcpSock),
		"bpf_sk_redirect_map":   features.HaveProgramHelper(ebpf.SkSKB, asm.FnSkRedirectMap),
		"bpf_skb_adjust_room":   features.HaveProgramHelper(ebpf.SkSKB, asm.FnSkbAdjustRoom),
		"bpf_get_socket_cookie": features.HaveProgramHelper(ebpf.SkSKB, asm.FnGetSocketCookie),
	} {
		if errors.Is(err, ebpf.ErrNotSupported) { // any other error proves nothing
			lacking = append(lacking, name)
		}
	}
	if lacking != nil {
		return f.Missing("lacking "+strings.Join(lacking, ", "), "use a newer kernel, with CONFIG_BPF_STREAM_PARSER")
	}
	f.Detail = "sk_skb, sockmap, ring buffer, helpers"
	return f
}

func probeCgroup2() Finding {
	f := Finding{Name: "cgroup2", State: StateOK}
	at, err := Cgroup2Mount()
	if err != nil || at == "" {
		return f.Degraded("no cgroup2 is mounted: local targets are spliced as others are", "mount -t cgroup2 none /sys/fs/cgroup/unified")
	}
	f.Detail = at
	return f
}

// Cgroup2Mount finds where the second hierarchy is; a machine with the first one has it elsewhere.
func Cgroup2Mount() (string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		// 30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw
		before, after, ok := strings.Cut(line, " - ")
		fields := strings.Fields(before)
		if ok && strings.HasPrefix(after, "cgroup2 ") && len(fields) > 4 {
			return fields[4], nil
		}
	}
	return "", nil
}

func probeJIT() Finding {
	f := Finding{Name: "bpf jit", State: StateOK}
	const sysctl = "/proc/sys/net/core/bpf_jit_enable"
	b, err := os.ReadFile(sysctl)
	switch v := strings.TrimSpace(string(b)); {
	case errors.Is(err, os.ErrNotExist):
		return f.Degraded("the kernel has none: the verdict is interpreted", "")
	case err != nil:
		return f.Degraded(sysctl+" can't be read", "run doctor as root")
	case v == "0":
		return f.Degraded("switched off: the verdict is interpreted", "sysctl -w net.core.bpf_jit_enable=1")
	}
	f.Detail = "on"
	return f
}

// TCPBuffer is the largest buffer that a socket of this network namespace gets by itself, tcp_rmem or
// tcp_wmem. Bytes; 0: not known.
func TCPBuffer(name string) (most int64) {
	b, _ := os.ReadFile("/proc/sys/net/ipv4/" + name)
	if fields := strings.Fields(string(b)); len(fields) == 3 {
		most, _ = strconv.ParseInt(fields[2], 10, 64)
	}
	return most
}

// probeMemory says what a flow whose reader has stopped may hold.
func probeMemory() Finding {
	f := Finding{Name: "socket memory", State: StateOK}
	var most [2]int64
	for i, name := range []string{"tcp_rmem", "tcp_wmem"} {
		if most[i] = TCPBuffer(name); most[i] == 0 {
			return f.Degraded("net.ipv4."+name+" can't be read", "")
		}
	}
	f.Detail = fmt.Sprintf("a socket may hold %d KiB received and %d KiB to send (tcp_rmem, tcp_wmem); a stalled flow up to %d MiB beside flow_buffer",
		most[0]>>10, most[1]>>10, 2*(most[0]+most[1])>>20)
	return f
}
