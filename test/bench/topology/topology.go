// Package topology makes the three hosts of the benchmark, client, proxy and server, on this machine, each in
// a network namespace: joined by veth pairs, or with a real tailnet between proxy and server.
package topology

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/test/bench/peers"
)

// Host is where programs run.
type Host interface {
	// Start starts c in the host's namespaces, so that it ends with this process.
	Start(c *exec.Cmd) error
	// Sysctl sets net.NAME, e.g. "ipv4/ip_forward".
	Sysctl(name, value string) error
}

// Topology is the three hosts and how they reach each other.
type Topology struct {
	Name                  string
	Client, Proxy, Server Host

	Listen netip.Addr     // the proxy's address that the client dials
	Target netip.AddrPort // the server as the proxy dials it
	Direct netip.AddrPort // the server as the client dials it, through the proxy's plain forwarding
	Note   string         // what Direct is here

	// SetDirect and SetNAT make the kernel of the proxy forward Direct, or Listen:port with NAT, and undo it.
	// nil: always there.
	SetDirect func(on bool) error

	// Far is Listen over a path with a delay; FarDirect is Direct over that path. Invalid: there is none.
	Far       netip.Addr
	FarDirect netip.AddrPort

	// SetLoss loses this part of the packets between client and proxy, each way. nil: can't.
	SetLoss func(p float64) error

	Close func() error
}

// ServerPort is where the server listens.
const ServerPort = 7000

// run runs a program on a host and returns what it printed.
func run(h Host, stdin string, argv ...string) error {
	c := exec.Command(argv[0], argv[1:]...)
	var out strings.Builder
	c.Stdin, c.Stdout, c.Stderr = strings.NewReader(stdin), &out, &out
	err := h.Start(c)
	if err == nil {
		err = c.Wait()
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, strings.TrimSpace(out.String()))
	}
	return nil
}

// DNAT has the proxy's kernel send what comes to the port on to the server.
func DNAT(t *Topology, port uint16) error {
	rules, err := peers.Render("dnat.nft", map[string]string{"PORT": strconv.Itoa(int(port)), "SERVER": t.Target.String()})
	if err != nil {
		return err
	}
	return run(t.Proxy, rules, "nft", "-f", "-")
}

// NoDNAT undoes DNAT.
func NoDNAT(t *Topology) error {
	return run(t.Proxy, "", "nft", "delete", "table", "ip", "ts_bench_dnat")
}

// tune sets what every host has, as an administrator of a busy proxy would.
func tune(h Host) error {
	var err error
	for _, s := range [][2]string{
		{"ipv4/ip_local_port_range", "1024 65535"},
		// Of that, what servers and systems listen on: an outgoing connection must not have it first.
		{"ipv4/ip_local_reserved_ports", "6080,6443,7000-7099,8400-8599"},
		// A closed flow's ports can be used again after a second, and few are remembered: otherwise the tests
		// that open many flows slow down whoever comes after them.
		{"ipv4/tcp_tw_reuse", "1"},
		{"ipv4/tcp_max_tw_buckets", "2000"},
		{"core/somaxconn", "4096"},
		{"ipv4/tcp_max_syn_backlog", "4096"},
		{"ipv4/tcp_no_metrics_save", "1"}, // each flow begins like the first
		{"ipv4/conf/all/rp_filter", "0"},
		{"ipv4/conf/default/rp_filter", "0"},
	} {
		err = errors.Join(err, h.Sysctl(s[0], s[1]))
	}
	return errors.Join(err, useCubic(h))
}

// useCubic gives a host Debian's default congestion control. BBR, which some machines are set to, paces by a
// timer, and takes minutes to find its rate again after a reader that had stopped goes on. In a namespace
// only what the machine allows to anybody can be set: it is allowed for that moment.
func useCubic(h Host) error {
	const allowed = "/proc/sys/net/ipv4/tcp_allowed_congestion_control"
	was, err := os.ReadFile(allowed)
	if err != nil {
		return err
	}
	if !slices.Contains(strings.Fields(string(was)), "cubic") {
		if err := os.WriteFile(allowed, []byte(strings.TrimSpace(string(was))+" cubic"), 0); err != nil {
			return fmt.Errorf("allow cubic: %w", err)
		}
		defer os.WriteFile(allowed, was, 0)
	}
	return h.Sysctl("ipv4/tcp_congestion_control", "cubic")
}

// Lacks says what the machine lacks, or "".
func Lacks() string {
	var lacks []string
	if os.Getuid() != 0 {
		lacks = append(lacks, "root")
	}
	for _, t := range []string{"ip", "nft"} {
		if _, err := exec.LookPath(t); err != nil {
			lacks = append(lacks, t)
		}
	}
	if unix.Access("/dev/net/tun", unix.R_OK) != nil {
		lacks = append(lacks, "/dev/net/tun")
	}
	return strings.Join(lacks, ", ")
}
