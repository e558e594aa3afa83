package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/announce"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/container"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/health"
	"github.com/tailsplice/tailsplice/userspace/plan"
)

// TestWhileDownClose: a listener is shut until its default answers, shut again when it no longer does, and
// open once it does; flows go on meanwhile, and one that accepts stays as it is.
func TestWhileDownClose(t *testing.T) {
	target, addr, stays := freeAddr(t), freeAddr(t), freeAddr(t)
	yaml := func(whileDown, more string) string {
		return fmt.Sprintf(`
listeners:
  - { name: web, listen: [%q], mode: tcp, default: { forward: %q }, while_down: %s }
  - { name: stays, listen: [%q], mode: tcp, default: { forward: %q } }
%s`, addr, target, whileDown, stays, target, more)
	}
	listens := func(addr string) bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err == nil
	}
	d := start(t, yaml("close", ""))
	shut := func() bool {
		l := d.Status().Listeners[0]
		return l.Closed != "" && len(l.Bound) == 0 && d.has(PartDefault, target, "") && !d.Ready().Ready
	}
	if !shut() || listens(addr) {
		t.Errorf("it is open before its default has answered: %+v", d.Status().Listeners[0])
	}
	if !listens(stays) {
		t.Error("the other listener is closed")
	}
	eventually(t, "the log says that it stays closed", func() bool { return d.log.Count("stays closed") == 1 })
	eventually(t, "status says why", func() bool { return d.has(PartDefault, target, "the target refused the connection") })

	serve := func() net.Listener {
		ln, err := net.Listen("tcp", target)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				go echo(c)
			}
		}()
		return ln
	}
	ln := serve()
	eventually(t, "it opens", func() bool { return listens(addr) })
	if l := d.Status().Listeners[0]; l.Closed != "" || len(l.Bound) != 1 || !d.Ready().Ready || l.WhileDown != "close" {
		t.Errorf("open: %+v, %q", l, d.Problems())
	}
	flow := dialTCP(t, addr)
	said := func() {
		t.Helper()
		io.WriteString(flow, "x")
		if _, err := io.ReadFull(flow, make([]byte, 1)); err != nil {
			t.Errorf("the flow: %v", err)
		}
	}
	said()

	// A reload changes nothing of it.
	if err := d.Reload(parse(t, yaml("close", "limits: { connections: 1000 }\n"))); err != nil {
		t.Fatal(err)
	}
	if !listens(addr) {
		t.Error("a reload closes it")
	}
	ln.Close()
	before := time.Now()
	eventually(t, "it is shut", shut)
	t.Logf("shut after %v", time.Since(before))
	if listens(addr) {
		t.Error("it still listens")
	}
	said()
	if err := d.Reload(parse(t, yaml("close", ""))); err != nil {
		t.Fatal(err)
	}
	if listens(addr) {
		t.Error("a reload opens it")
	}
	// Somebody else takes its port meanwhile: it is open again when that has ended.
	other, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	ln = serve()
	defer ln.Close()
	eventually(t, "it can't be bound", func() bool { return d.has(PartAddress, addr, "in use") })
	other.Close()
	eventually(t, "it opens again", func() bool { return len(d.Status().Listeners[0].Bound) == 1 && listens(addr) })
	said()

	ln.Close()
	eventually(t, "it is shut once more", shut)
	if err := d.Reload(parse(t, yaml("accept", ""))); err != nil {
		t.Fatal(err)
	}
	if !listens(addr) || len(d.Problems()) != 0 {
		t.Errorf("without while_down: close: %q", d.Problems())
	}
	if n := strings.Count(d.log.String(), "a listener is closed"); n != 2 {
		t.Errorf("%d times closed", n)
	}
}

// TestGateCounts: how many checks shut and open a listener, and what a late answer counts.
func TestGateCounts(t *testing.T) {
	d := start(t, fmt.Sprintf(`listeners: [ { name: a, listen: [%q], mode: tcp, default: { forward: "127.0.0.1:9" } } ]`, freeAddr(t)))
	refused := errors.New("refused")
	for _, c := range []struct {
		checks string // +: answered, -: failed, l: late
		opened bool   // it was open before
		want   string // whether it is shut after each: s, or o for open
	}{
		{"++--+---", true, "ooooooos"},
		{"ll+ll+lll", true, "oooooooos"},
		{"---+-+++", true, "oossssoo"},
		{"---+l+", true, "oossso"},
		{"-+", false, "so"},
		{"l+", false, "so"},
		{"--????????-", true, "oooooooooos"},
		{"---+?+?-?++", true, "oosssoooooo"},
		{"????", false, "ssss"},
	} {
		l := &listener{name: "test"}
		g := &gate{server: d.Server, listener: l, checked: checked{isShut: !c.opened, wasOpen: c.opened}}
		for i, check := range c.checks {
			switch check {
			case '+':
				g.note(t.Context(), nil, false)
			case '-':
				g.note(t.Context(), refused, false)
			case '?':
				g.note(t.Context(), syscall.EMFILE, false)
			case 'l':
				g.note(t.Context(), refused, true)
			}
			if want := c.want[i] == 's'; g.isShut != want || (g.closed() != nil) != want && i > 0 {
				t.Errorf("%s, after %d: shut %t, %v", c.checks, i+1, g.isShut, g.closed())
			}
		}
	}
}

// TestInheritShut: a process that takes over knows that a listener was open once, and why it is closed, unless its
// default is another one.
func TestInheritShut(t *testing.T) {
	target, other, addr := freeAddr(t), freeAddr(t), freeAddr(t)
	yaml := func(target string) string {
		return fmt.Sprintf("listeners: [ { name: web, listen: [%q], mode: tcp, default: { forward: %q }, while_down: close } ]", addr, target)
	}
	old := start(t, yaml(target))
	before, err := old.Orders()
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", target)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is open", func() bool { return old.Status().Listeners[0].Closed == "" })
	ln.Close()
	eventually(t, "it is closed", func() bool { return old.Status().Listeners[0].Closed != "" })
	var after json.RawMessage
	eventually(t, "the next process hears of it", func() bool {
		after, err = old.Orders()
		return err != nil || strings.Contains(string(after), `"shut"`)
	})
	if err != nil {
		t.Fatal(err)
	}
	why := old.Status().Listeners[0].Closed
	old.Close()
	for _, c := range []struct {
		name, target string
		orders       json.RawMessage
		wasOpen      bool
	}{
		{"it was never open", target, before, false},
		{"it was open", target, after, true},
		{"its default is another one", other, after, false},
	} {
		d := startOptions(t, parse(t, yaml(c.target)), Options{Orders: c.orders})
		if got := d.Status().Listeners[0]; got.Closed == "" || c.wasOpen && got.Closed != why || len(got.Bound) > 0 {
			t.Errorf("%s: %+v, and was closed since %s", c.name, got, why)
		}
		d.mu.Lock()
		g := d.listeners["web"].gate
		d.mu.Unlock()
		g.note(t.Context(), nil, false)
		if isOpen := d.Status().Listeners[0].Closed == ""; isOpen == c.wasOpen {
			t.Errorf("%s: after one check that succeeds it is open: %v", c.name, isOpen)
		}
		d.Close()
	}
}

// TestOrdersInParts: why listeners are closed is cut, and what has no room in a message goes in another one.
// All of it comes to the next process, whatever there is much of, and the rest of it where a part makes no
// sense.
func TestOrdersInParts(t *testing.T) {
	const n = mostFirst/health.MostBrief + 10
	target, yaml := freeAddr(t), "listeners:\n"
	for i := range n { // at addresses that are not bound while nothing answers
		yaml += fmt.Sprintf("- { name: web%d, listen: [\"127.0.0.1:%d\"], mode: tcp, default: { forward: %q }, while_down: close }\n", i, 20000+i, target)
	}
	d := start(t, yaml)
	because := func(why error) (whole, first orders) {
		t.Helper()
		d.mu.Lock()
		var gates []*gate
		for _, l := range d.listeners {
			l.wasOpen = true
			gates = append(gates, l.gate)
		}
		d.mu.Unlock()
		for _, g := range gates {
			g.stop()
			g.mu.Lock() // until no check is being counted
			g.why.Store(&why)
			g.mu.Unlock()
		}
		all, err := d.Orders()
		part, _, err2 := d.OrdersInParts()
		err = errors.Join(err, err2, json.Unmarshal(all, &whole), json.Unmarshal(part, &first))
		if err != nil || len(part) > mostFirst {
			t.Fatalf("%d bytes in the first part: %v", len(part), err)
		}
		return whole, first
	}
	if whole, first := because(errors.New("short")); len(whole.Shut) != n || len(first.Shut) != n {
		t.Errorf("%d are closed, and %d in the first part", len(whole.Shut), len(first.Shut))
	}
	whole, first := because(errors.New("x" + strings.Repeat("é", 40<<10)))
	if got := whole.Shut["web7"].Why; len(got) > health.MostBrief || len(got) < health.MostBrief-1 || !strings.HasSuffix(got, "é") {
		t.Errorf("closed because of %d bytes: %.400s", len(got), got)
	}
	if len(first.Shut) == n {
		t.Error("all are closed in the first part")
	}

	const long = 64 << 10 / n
	pad := func(i int) string { return fmt.Sprint(i, strings.Repeat("x", long)) }
	giveLongOrders(d.Server, n, pad)
	all, parts, err := d.OrdersInParts()
	if err != nil {
		t.Fatal(err)
	}
	for i, part := range append(slices.Clone(parts), all) {
		if len(part) > mostFirst {
			t.Errorf("part %d has %d bytes", i, len(part))
		}
	}
	next := new(Server)
	next.log, next.wakes = d.Server.log, newWakes()
	next.mu.Lock()
	defer next.mu.Unlock()
	if err := next.inherit(all, append(parts, json.RawMessage("[]"))); err != nil {
		t.Fatal(err)
	}
	defer next.wakes.stop()
	o := next.orders
	if len(o.Drained) != n || len(o.Lingers) != n || len(next.disabled.Since()) != n || len(next.announced) != n ||
		len(next.wakes.list()) != n || len(o.Shut) != n {
		t.Errorf("of %d come %d that are drained, %d that linger, %d disabled, %d announced, %d started and %d closed", n, len(o.Drained),
			len(o.Lingers), len(next.disabled.Since()), len(next.announced), len(next.wakes.list()), len(o.Shut))
	}
}

// TestGateTells: which failures of a check are a reason to shut the listener. Each is made where the kernel would
// make it.
func TestGateTells(t *testing.T) {
	check := func(what string, target dial.Target, fail error, want bool) {
		t.Helper()
		d := &dial.Dialer{From: func(nd *net.Dialer, _ netip.Addr) {
			nd.Control = func(string, string, syscall.RawConn) error { return os.NewSyscallError("connect", fail) }
		}}
		r := &plan.Rule{Target: plan.Target{All: []*config.Forward{{To: config.Target(target)}}, Dialer: d}}
		l := &listener{name: "test"}
		l.service.Store(&service{Service: &plan.Service{Fallback: r}})
		err := (&gate{server: new(Server), listener: l}).reach(t.Context())
		if err == nil || tells(err) != want {
			t.Errorf("%s: it tells of the target: %v, want %v: %v", what, !want, want, err)
		}
	}
	v4 := dial.Target{Scheme: dial.TCP, Host: "192.0.2.1", Port: 9}
	v6 := dial.Target{Scheme: dial.TCP, Host: "2001:db8::1", Port: 9}
	for errno, want := range map[syscall.Errno]bool{
		syscall.ECONNREFUSED: true, syscall.ETIMEDOUT: true, syscall.EHOSTUNREACH: true, syscall.EHOSTDOWN: true,
		syscall.ENETUNREACH: true, syscall.ENETDOWN: true, // also for want of a route here: others may have one
		syscall.EMFILE: false, syscall.ENFILE: false, syscall.ENOBUFS: false, syscall.ENOMEM: false,
		syscall.EADDRNOTAVAIL: false, // no port is free; over IPv6 also that this host has no address for it
		syscall.EAGAIN:        false, syscall.EINTR: false,
		syscall.EPERM: false, syscall.EACCES: false, // the firewall's table is full; or a rule of this host
		syscall.EINVAL: false, syscall.EIO: false, // which nobody has thought of
	} {
		check(errno.Error()+", IPv4", v4, errno, want)
		check(errno.Error()+", IPv6", v6, errno, want)
	}
	unix := dial.Target{Scheme: dial.Unix, Path: filepath.Join(t.TempDir(), "none.sock")}
	check("no socket", unix, nil, true)
	check("no tailnet", dial.Target{Scheme: dial.Tailnet, Host: "home", Port: 9}, nil, false) // never in a plan
	for _, c := range []struct {
		err  error
		want bool
	}{
		{&dial.Error{Reason: dial.NodeOffline, Err: context.DeadlineExceeded}, true},
		{&dial.Error{Reason: dial.NoTailscaled, Err: syscall.ENOENT}, true},
		{&dial.Error{Reason: dial.NoTailscaled, Err: fmt.Errorf("ask: %w", syscall.EMFILE)}, false},
		{&dial.Error{Reason: dial.TailscaleDown}, true},
		{&dial.Error{Reason: dial.UnknownContainer}, true},
		{&dial.Error{Reason: dial.DNS, Err: &net.DNSError{IsNotFound: true}}, true},
		{&dial.Error{Reason: dial.DNS, Err: &net.DNSError{IsTemporary: true}}, false},
		{&dial.Error{Reason: dial.DNS, Err: &net.DNSError{IsTemporary: true, IsTimeout: true}}, true},
		{&dial.Error{Reason: dial.Canceled}, false},
	} {
		if tells(c.err) != c.want {
			t.Errorf("%#v: it tells of the target: %v", c.err, !c.want)
		}
	}
}

// giveLongOrders has all listeners of srv drained, and n targets disabled, listeners announced and containers
// started whose names are those of pad.
func giveLongOrders(srv *Server, n int, pad func(int) string) {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	for _, l := range srv.listeners {
		l.drained, l.lingers, l.until = time.Now(), true, time.Now().Add(time.Hour)
	}
	for i := range n {
		srv.disabled.Set(pad(i), true)
		srv.announced = append(srv.announced, announce.Spec{Listener: pad(i), Up: []string{"true"}})
		giveWoken(srv, pad(i))
	}
}

func giveWoken(srv *Server, id string) {
	srv.wakes.mu.Lock()
	defer srv.wakes.mu.Unlock()
	srv.wakes.add(&woken{Started: container.Started{ID: id, At: "then"}, Idle: time.Hour, Used: time.Now()}, srv.lapse)
}
