package unit

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// Targets say first who connects, and then echo. One is a unit; the other has a network of its own, as a
// container.
const (
	echo = "[Service]\nExecStart=socat TCP-LISTEN:7000,fork,reuseaddr 'SYSTEM:echo $$SOCAT_PEERADDR; exec cat'\n"
	box  = echo + "NetworkNamespacePath=/run/netns/box\n"

	boxIP   = "10.77.0.2"
	network = `
ip netns add box
ip link add box0 type veth peer name eth0 netns box
ip addr add 10.77.0.1/24 dev box0
ip link set box0 up
ip -n box addr add 10.77.0.2/24 dev eth0
ip -n box link set eth0 up
ip -n box route add default via 10.77.0.1
`
	config = `
listeners:
  - { name: userspace, listen: [":9100"], mode: tcp, default: { forward: "127.0.0.1:7000" } }
  - { name: sockmap, listen: [":9101"], mode: tcp, default: { forward: "127.0.0.1:7000", datapath: sockmap } }
  - { name: unit, listen: [":9102"], mode: tcp, default: { forward: "127.0.0.1:7000", datapath: sk_msg } }
  - { name: container, listen: [":9103"], mode: tcp, default: { forward: "10.77.0.2:7000", datapath: sk_msg } }
  - { name: transparent, listen: [":9104"], mode: tcp, default: { forward: "10.77.0.2:7000", transparent: true } }
  - { name: both, listen: [":9105"], mode: tcp, default: { forward: "10.77.0.2:7000", transparent: true, datapath: sockmap } }
`
)

func TestUnit(t *testing.T) {
	options := lab.Options{NoTailnet: true, NoAnycast: true, NoDocker: true}
	lab.Require(t, options, "systemd-nspawn", "socat", "make", "script", "ip", "nsenter", "pgrep")
	typesAll(t)
	w := lab.Start(t, options)
	m := boot(t, w.EdgeA)
	m.write(t, "etc/systemd/system/echo.service", echo)
	m.write(t, "etc/systemd/system/box.service", box)
	m.write(t, "etc/tailsplice/tailsplice.yaml", config)
	m.run(t, "sh", "-ec", network)
	if err := w.EdgeA.Sysctl("ipv4/ip_forward", "1"); err != nil {
		t.Fatal(err)
	}
	m.restart(t)
	m.run(t, "systemctl", "start", "echo.service", "box.service")

	type want struct {
		port               int
		listener, datapath string
		client             bool // the target sees the client's own address
	}
	check := func(t *testing.T, c want) {
		t.Helper()
		deadline := time.Now().Add(time.Minute)
		for {
			seen, had, err := m.flow(t, w, c.port, c.listener)
			if err != nil {
				t.Fatalf("%v\n%s", err, m.journal())
			}
			if (seen == w.Client.IP4.String()) != c.client {
				t.Errorf("the target sees %s, the client is %v", seen, w.Client.IP4)
			}
			if had == c.datapath {
				return
			}
			// The first flow to a target is how sk_msg gets to know it.
			if c.datapath != "sk_msg" || time.Now().After(deadline) {
				t.Fatalf("it went by %q, want %s\n%s\n%s", had, c.datapath, m.run(t, "tailsplice", "status"),
					m.journal())
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
	t.Run("sandbox", func(t *testing.T) {
		status := m.run(t, "sh", "-c",
			"cat /proc/$(systemctl show --value --property=MainPID "+service+")/status")
		for _, line := range []string{"NoNewPrivs:\t1", "Seccomp:\t2"} {
			if !strings.Contains(status, line) {
				t.Errorf("%q is not true: this systemd doesn't confine the daemon:\n%s", line, status)
			}
		}
	})
	for _, c := range []want{
		{9100, "userspace", "userspace", false},
		{9101, "sockmap", "sockmap", false},
		{9102, "unit", "sk_msg", false},
		{9103, "container", "sockmap", false},
		{9104, "transparent", "userspace", true},
		{9105, "both", "sockmap", true},
	} {
		t.Run(c.listener, func(t *testing.T) { check(t, c) })
	}
	t.Run("container, not looked into", func(t *testing.T) {
		deadline := time.Now().Add(time.Minute)
		for { // the first flow is refused because nothing is known yet
			check(t, want{9103, "container", "sockmap", false})
			s := m.run(t, "tailsplice", "status")
			if strings.Contains(s, "could not be found") {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("status names no reason:\n%s", s)
			}
		}
	})
	t.Run("upgrade", func(t *testing.T) { m.upgrade(t, w, []int{9100, 9101, 9104, 9105}, []int{9102}) })
	t.Run("container, with the drop-in of docs/local.md", func(t *testing.T) {
		m.write(t, "root/drop-in", dropIn(t))
		m.write(t, "root/editor", "#!/bin/sh\nexec sed -i '/^### Anything/r /root/drop-in' \"$@\"\n")
		edit := block(t, "sudo systemctl edit")
		m.shell(t, "/", `chmod +x /root/editor
export SYSTEMD_EDITOR=/root/editor SHELL=/bin/bash
export -f sudo
script --quiet --return --command '`+edit+`' /dev/null`) // it wants a terminal
		ran(t, edit)
		m.restart(t)
		check(t, want{9103, "container", "sk_msg", false})
	})
}

// dropIn is what the documentation tells people to add.
func dropIn(t *testing.T) string {
	t.Helper()
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "docs/local.md"))
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile("(?s)```ini\n(.*?)```").FindSubmatch(text)
	if found == nil {
		t.Fatal("docs/local.md has no drop-in")
	}
	return strings.ReplaceAll(string(found[1]), "\n  ", "\n")
}

// flow makes a connection from the client, has bytes echoed by it, in small messages and in bulk, and says
// whom the target saw and what the flow went by.
func (m *machine) flow(t *testing.T, w *lab.World, port int, listener string) (seen, datapath string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, err := w.Client.Dial(ctx, "tcp4", net.JoinHostPort(m.host.IP4.String(), fmt.Sprint(port)))
	if err != nil {
		return "", "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	r := bufio.NewReader(c)
	if seen, err = r.ReadString('\n'); err != nil {
		return "", "", fmt.Errorf("read whom the target saw: %w", err)
	}
	for i, size := range []int{1, 200, 200, 16 << 10, 4 << 20} {
		if err := (&echoed{c, r}).exchange(size); err != nil {
			return "", "", fmt.Errorf("message %d: %w", i, err)
		}
	}
	return strings.TrimSpace(seen), m.datapath(t, listener), nil
}
