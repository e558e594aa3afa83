package sockmap

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/tailsplice/tailsplice/loader/host"
	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/prove"
)

func TestSelfTest(t *testing.T) {
	l := open(t, nil, 16)
	all := l.SelfTest()
	for end := time.Now().Add(loadertest.Patience); len(all) > 0 && all[len(all)-1].Lacks && time.Now().Before(end); {
		t.Logf("once more, since %s", all[len(all)-1].Detail) // what others on this machine use
		time.Sleep(time.Second)
		all = l.SelfTest()
	}
	for _, f := range all {
		t.Logf("%-10s %-8s %v %s", f.Name, f.State, f.Took, f.Detail)
		if f.State != host.StateOK {
			t.Errorf("%s: %s: %s", f.Name, f.State, f.Detail)
		}
	}
	if n := l.flows(); n != 0 {
		t.Errorf("%d flows are left", n)
	}
}

// Each rule that the self-test is there for makes it fail when it is off.
func TestSelfTestFindsBrokenRules(t *testing.T) {
	for name, c := range map[string]struct {
		off   []Rule
		tests []string
	}{
		"bound": {[]Rule{ruleBound}, []string{"bound"}},
		"trim":  {[]Rule{ruleTrim}, []string{"trim", "overlap"}},
		"kick":  {[]Rule{ruleKick, ruleSweep}, []string{"kick"}},
		"reset": {[]Rule{ruleReset}, []string{"reset"}},
	} {
		t.Run(name, func(t *testing.T) {
			l := open(t, new(Hooks).Without(c.off...), 16)
			found := map[string]host.Finding{}
			all := l.SelfTest()
			for _, f := range all {
				found[f.Name] = f
			}
			for _, test := range c.tests {
				if f := found[test]; f.State != host.StateMissing {
					t.Errorf("%s did not fail: %+v", test, f)
				} else {
					t.Logf("%s: %s", test, f.Detail)
				}
			}
			var e *prove.SelfTestError
			if err := prove.Failed(all); !errors.As(err, &e) {
				t.Errorf("no error: %v", err)
			}
		})
	}
}

// What the machine lacks is no fault of the kernel's.
func TestSelfTestSaysWhatIsLacking(t *testing.T) {
	if !loadertest.InNewNetwork(t) {
		return
	}
	set := func(name, value string) func(*Hooks) {
		return func(*Hooks) { loadertest.Must(t, os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(value), 0)) }
	}
	loopback := func(set func(netlink.Link) error) func(*Hooks) {
		return func(*Hooks) {
			lo, err := netlink.LinkByName("lo")
			loadertest.Must(t, errors.Join(err, set(lo)))
		}
	}
	nothing := func(*Hooks) {}
	const small = "a socket may have a buffer of 4096 bytes only"
	for _, c := range []struct {
		name         string
		make, unmake func(*Hooks)
		detail       string
		advice       string
	}{
		{"small send buffers", set("tcp_wmem", "4096 4096 4096"), set("tcp_wmem", "4096 16384 4194304"),
			small + " (net.ipv4.tcp_wmem)", "sysctl -w net.ipv4.tcp_wmem="},
		{"small receive buffers", set("tcp_rmem", "4096 4096 4096"), set("tcp_rmem", "4096 131072 6291456"),
			small + " (net.ipv4.tcp_rmem)", "sysctl -w net.ipv4.tcp_rmem="},
		{"no memory", func(r *Hooks) { loadertest.HoldMemory(t); r.Pressure = 1 }, nothing,
			"TCP is short of memory", "sysctl net.ipv4.tcp_mem"},
		{"lo is down", loopback(netlink.LinkSetDown), loopback(netlink.LinkSetUp),
			"the interface lo is down", "ip link set lo up"},
		{"lo has no address", loopback(func(lo netlink.Link) error {
			address, err := netlink.ParseAddr("127.0.0.1/8")
			return errors.Join(err, netlink.AddrDel(lo, address))
		}), nothing, "no connection over loopback can be made", "ip addr show lo"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := new(Hooks)
			c.make(r)
			defer c.unmake(r)
			l := open(t, r, 16)
			all := l.SelfTest()
			f := all[len(all)-1]
			says := func(text, what string) {
				if !strings.Contains(text, what) {
					t.Errorf("%q does not say %q", text, what)
				}
			}
			says(f.Detail, c.detail)
			says(f.Advice, c.advice)
			var e *prove.SelfTestError
			err := prove.Failed(all)
			if !errors.As(err, &e) || !e.Again() {
				t.Fatalf("it failed with %v", err)
			}
			says(err.Error(), "it can't be proven now that this kernel splices rightly: "+c.detail)
			says(err.Error(), c.advice)
		})
	}
}
