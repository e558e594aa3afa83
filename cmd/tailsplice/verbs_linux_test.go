package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/test/freeaddr"
	"github.com/tailsplice/tailsplice/userspace/flow"
)

// verbsDaemon is a daemon that is changed while it runs.
type verbsDaemon struct {
	t                  *testing.T
	config, control    string
	log                string // its file
	health, metricsURL string
}

// startVerbs starts one whose listeners are these, with health and metrics.
func startVerbs(t *testing.T, listeners string) *verbsDaemon {
	t.Helper()
	dir, err := os.MkdirTemp("", "ts-cli-")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	d := &verbsDaemon{t: t, config: filepath.Join(dir, "edge.yaml"), control: filepath.Join(dir, "control.sock"), log: filepath.Join(dir, "log")}
	health, metrics := freeaddr.Get(t), freeaddr.Get(t)
	d.health, d.metricsURL = "http://"+health+"/readyz", "http://"+metrics+"/metrics"
	check(t, os.WriteFile(d.config, fmt.Appendf(nil, "listeners:\n%s\ncontrol: { socket: %q, health: %q, metrics: %q }\n",
		listeners, d.control, health, metrics), 0o600))
	log, err := os.Create(d.log)
	check(t, err)
	defer log.Close()
	cmd := exec.Command("tailsplice", "run", "--config", d.config, "--log-format", "json")
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	check(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGINT)
		_ = cmd.Process.Signal(syscall.SIGINT)
		if err := cmd.Wait(); err != nil || t.Failed() {
			t.Errorf("the daemon: %v\n%s", err, d.logged())
		}
	})
	wait(t, "the daemon answers", func() error { _, err := d.ask("status"); return err })
	return d
}

func (d *verbsDaemon) logged() string {
	b, _ := os.ReadFile(d.log)
	return string(b)
}

func (d *verbsDaemon) ask(command ...string) (string, error) {
	cmd := exec.CommandContext(d.t.Context(), "tailsplice", append(command, "--control", d.control)...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// says asks for what must succeed, or fail with an exit status of 1, and say so.
func (d *verbsDaemon) says(ok bool, want string, command ...string) {
	d.t.Helper()
	out, err := d.ask(command...)
	status := 0
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		status = exit.ExitCode()
	} else if err != nil {
		d.t.Fatal(err)
	}
	if status != map[bool]int{true: 0, false: 1}[ok] || !strings.Contains(out, want) {
		d.t.Errorf("tailsplice %s: exit status %d, %q, want %q", strings.Join(command, " "), status, out, want)
	}
}

func (d *verbsDaemon) reload() {
	d.t.Helper()
	d.says(true, "", "reload")
}

// ready checks what /readyz says.
func (d *verbsDaemon) ready(status int, want string) {
	d.t.Helper()
	d.page(d.health, status, want)
}

// counts checks what a metric is.
func (d *verbsDaemon) counts(series string) {
	d.t.Helper()
	d.page(d.metricsURL, 200, "\n"+series+"\n")
}

func (d *verbsDaemon) page(url string, status int, want string) {
	d.t.Helper()
	res, err := http.Get(url)
	check(d.t, err)
	defer res.Body.Close()
	body, _ := io.ReadAll(res.Body)
	if res.StatusCode != status || !strings.Contains(string(body), want) {
		d.t.Errorf("%s: %d %s, want %d %q", url, res.StatusCode, body, status, want)
	}
}

// completes checks what a shell is offered for the last of these words.
func (d *verbsDaemon) completes(want string, words ...string) {
	d.t.Helper()
	at := slices.IndexFunc(words, func(w string) bool { return strings.HasPrefix(w, "--") || w == "" })
	out, err := exec.CommandContext(d.t.Context(), "tailsplice", append([]string{"__complete"}, slices.Insert(words, at, "--control="+d.control)...)...).Output()
	check(d.t, err)
	names, ok := strings.CutSuffix(string(out), ":4\n") // no names of files
	if got := strings.Join(strings.Fields(names), " "); !ok || got != want {
		d.t.Errorf("completion of %q: %q, want %q", words, out, want)
	}
}

// echoes serves what it is sent.
func echoes(t *testing.T) string {
	ln := listen(t, "127.0.0.1:0")
	go func() {
		for c, err := ln.Accept(); err == nil; c, err = ln.Accept() {
			go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
		}
	}()
	return ln.Addr().String()
}

func dialed(t *testing.T, addr string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	check(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// echoed says something to an echo, which must answer.
func echoed(t *testing.T, c net.Conn) {
	t.Helper()
	_, err := c.Write([]byte("hello"))
	check(t, err)
	arrives(t, c, []byte("hello"))
}

// wantReset waits for one.
func wantReset(t *testing.T, c net.Conn) {
	t.Helper()
	check(t, c.SetReadDeadline(time.Now().Add(time.Minute)))
	if _, err := io.Copy(io.Discard, c); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%v, want a reset", err)
	}
}

// TestFlowsKill: flows that are named are reset on both sides, on each datapath, and others go on.
func TestFlowsKill(t *testing.T) {
	needRoot(t)
	for _, word := range []string{"userspace", "auto", "sockmap"} {
		t.Run(word, func(t *testing.T) { testKill(t, word) })
	}
}

func testKill(t *testing.T, datapath string) {
	at, web, target := freeaddr.Get(t), freeaddr.Get(t), listen(t, "127.0.0.1:0")
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "hello") }))
	defer app.Close()
	d := startVerbs(t, fmt.Sprintf(`
  - name: edge
    listen: [%q]
    mode: sni
    routes: [ { sni: [example.org], forward: %q, datapath: %s }, { sni: ["*.test"], forward: %q, datapath: %s } ]
  - { name: web, listen: [%q], mode: http, default: { forward: %q } }`, at, target.Addr(), datapath, target.Addr(), datapath, web, app.Listener.Addr()))
	type ends struct{ client, upstream net.Conn }
	open := func(from, name string) (e ends) {
		t.Helper()
		local := &net.TCPAddr{IP: net.ParseIP(from)}
		client, err := (&net.Dialer{LocalAddr: local}).Dial("tcp", at)
		check(t, err)
		hello := helloOf(t, name)
		_, err = client.Write(hello)
		check(t, err)
		upstream, err := target.Accept()
		check(t, err)
		t.Cleanup(func() { client.Close(); upstream.Close() })
		arrives(t, upstream, hello)
		return ends{client, upstream}
	}
	goesOn := func(e ends) {
		t.Helper()
		_, err := e.client.Write([]byte("x"))
		check(t, err)
		arrives(t, e.upstream, []byte("x"))
	}
	isOver := func(all ...ends) {
		t.Helper()
		for _, e := range all {
			wantReset(t, e.client)
			wantReset(t, e.upstream)
		}
	}
	flows := func(want int) (all []flow.Snapshot) {
		t.Helper()
		wait(t, fmt.Sprint(want, " flows live"), func() error {
			out, err := d.ask("flows", "--json")
			check(t, err)
			all = nil
			check(t, json.Unmarshal([]byte(out), &all))
			if len(all) != want {
				return errors.New(out)
			}
			return nil
		})
		return all
	}
	first, second, third, fourth, stays := open("127.0.0.2", "example.org"), open("127.0.0.3", "a.test"), open("127.0.0.4", "b.test"),
		open("127.0.0.5", "b.test"), open("127.0.0.6", "example.org")
	all := flows(5)
	d.completes("*.test example.org", "flows", "kill", "--route", "")

	d.says(true, "killed 1 flow\n", "flows", "kill", all[0].ID)
	isOver(first)
	d.says(false, "no flow has the id "+all[0].ID+": `tailsplice flows` lists all", "flows", "kill", all[0].ID)
	d.says(true, `"killed": 1`, "flows", "kill", "--client", "127.0.0.3", "--json")
	isOver(second)
	d.says(false, "no flow fits", "flows", "kill", "--name", "b.tes")
	d.says(false, "no flow fits", "flows", "kill", "--name", "b.test", "--route", "example.org")
	d.says(true, "killed 2 flows\n", "flows", "kill", "--name", "B.test", "--route", "*.test")
	isOver(third, fourth)
	goesOn(stays)
	flows(1)
	d.says(true, "killed 1 flow\n", "flows", "kill", "--route", "example.org")
	isOver(stays)
	flows(0)

	// A client's connection to an http listener.
	client := dialed(t, web)
	_, err := client.Write([]byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n"))
	check(t, err)
	flows(1)
	d.says(true, "killed 1 flow\n", "flows", "kill", "--client", "127.0.0.0/8")
	wantReset(t, client)
	flows(0)

	d.counts(`tailsplice_flows_cut_total{reason="killed"} 6`)
	wait(t, "each has its line", func() error {
		if log := d.logged(); strings.Count(log, `"end":"killed","`) != 6 || strings.Count(log, `"err":"killed at the control socket by uid 0, pid `) != 6 {
			return errors.New(log)
		}
		return nil
	})
	for _, wrong := range [][]string{{"flows", "kill"}, {"flows", "kill", "x", "--name", "y"}, {"flows", "kill", "--client", "x"}} {
		if out, err := d.ask(wrong...); err == nil || err.Error() != "exit status 2" {
			t.Errorf("%q: %v, %s", wrong, err, out)
		}
	}
}

// TestTarget: a disabled target gets no new connection and no new request; what goes to it goes on, and other
// targets of a route get the rest.
func TestTarget(t *testing.T) {
	app := func(name string) string {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, name) }))
		t.Cleanup(s.Close)
		return s.Listener.Addr().String()
	}
	to, web, raw := echoes(t), freeaddr.Get(t), freeaddr.Get(t)
	one, two := app("one"), app("two")
	d := startVerbs(t, fmt.Sprintf(`
  - name: web
    listen: [%q]
    mode: http
    routes: [ { host: [one.test], forward: %q } ]
    default: { forward: [ { to: %q }, { to: %q } ] }
  - { name: raw, listen: [%q], mode: tcp, default: { forward: %q } }`, web, one, one, two, raw, to))
	get := func(host string) (status int, body string) {
		t.Helper()
		r, err := http.NewRequest("GET", "http://"+web, nil)
		check(t, err)
		r.Host = host
		res, err := http.DefaultClient.Do(r)
		check(t, err)
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		check(t, err)
		return res.StatusCode, string(b)
	}
	both := func() (seen map[string]int) {
		t.Helper()
		seen = map[string]int{}
		for range 40 {
			_, body := get("any.test")
			seen[body]++
		}
		return seen
	}
	flow := dialed(t, raw)
	echoed(t, flow)
	if status, body := get("one.test"); status != 200 || body != "one" { // its connection stays in a pool
		t.Errorf("before: %d %s", status, body)
	}
	if seen := both(); seen["one"] == 0 || seen["two"] == 0 {
		t.Errorf("before: %v", seen)
	}
	names := []string{one, two, to}
	slices.Sort(names)
	d.completes(strings.Join(names, " "), "target", "disable", "")
	d.completes("", "target", "enable", "")

	d.says(true, one+" is disabled, and has 0 open flows\n", "target", "disable", one)
	d.reload()
	if status, body := get("one.test"); status != 503 {
		t.Errorf("its only target is disabled: %d %s", status, body)
	}
	if seen := both(); seen["two"] != 40 {
		t.Errorf("one of two is disabled: %v", seen)
	}
	d.says(true, "\ndisabled: "+one+" gets no new connections since 20", "status")
	d.says(true, `"disabled": "20`, "status", "--json")
	d.completes(one, "target", "enable", "")
	d.counts(fmt.Sprintf("tailsplice_target_disabled{target=%q} 1", one))
	d.says(true, one+" is enabled\n", "target", "enable", one)
	if status, body := get("one.test"); status != 200 || body != "one" {
		t.Errorf("enabled again: %d %s", status, body)
	}
	if seen := both(); seen["one"] == 0 {
		t.Errorf("enabled again: %v", seen)
	}

	d.says(true, to+" is disabled, and has 1 open flow\n", "target", "disable", to)
	if c, err := net.Dial("tcp", raw); err == nil {
		defer c.Close()
		wantReset(t, c)
	} else if !errors.Is(err, unix.ECONNRESET) { // which may come before connect(2) has returned
		t.Error(err)
	}
	echoed(t, flow)
	d.says(false, "dial "+to+": an operator has disabled it: `tailsplice target enable "+to+"`", "trace", "x.test")
	d.counts(`tailsplice_dial_errors_total{listener="raw",reason="disabled"} 1`)
	d.says(true, `"target": "`+to+`"`, "target", "enable", to, "--json")
	echoed(t, dialed(t, raw))

	d.says(false, `there is no target "nobody:1": there are `+strings.Join(names, ", "), "target", "disable", "nobody:1")
	for _, wrong := range [][]string{{"target"}, {"target", "disable"}, {"target", "off", "x"}} {
		if out, err := d.ask(wrong...); err == nil || err.Error() != "exit status 2" {
			t.Errorf("%q: %v, %s", wrong, err, out)
		}
	}
	if line := `"change":"target/disable target=` + url.QueryEscape(one); !strings.Contains(d.logged(), line) {
		t.Errorf("the log has no %s", line)
	}
}

// TestLogLevel: the level is shown, set, and stays over a reload; each change of it is logged.
func TestLogLevel(t *testing.T) {
	d := startVerbs(t, fmt.Sprintf(`
  - { name: web, listen: [%q], mode: tcp, default: { forward: "127.0.0.1:9" } }`, freeaddr.Get(t)))
	d.says(true, "info\n", "log", "level")
	d.says(true, "error\n", "log", "level", "error")
	d.reload()
	d.says(true, `"level": "error"`, "log", "level", "--json")
	if log := d.logged(); strings.Contains(log, "the configuration was reloaded") {
		t.Errorf("the level is error, and the log has lines of info: %s", log)
	}
	d.says(true, "debug\n", "log", "level", "debug")
	d.reload()
	log := d.logged()
	for _, line := range []string{`"change":"log/level level=error","uid":`, `"change":"reload","uid":`, `"change":"log/level level=debug","uid":`,
		"the configuration was reloaded"} {
		if !strings.Contains(log, line) {
			t.Errorf("the log has no %s: %s", line, log)
		}
	}
	d.completes("debug info warn error", "log", "level", "")
	for _, wrong := range [][]string{{"log"}, {"log", "level", "loud"}, {"log", "level", "info", "warn"}} {
		if out, err := d.ask(wrong...); err == nil || err.Error() != "exit status 2" {
			t.Errorf("%q: %v, %s", wrong, err, out)
		}
	}
}

// refuses checks that nobody listens at addr.
func (d *verbsDaemon) refuses(addr string) {
	d.t.Helper()
	c, err := net.Dial("tcp", addr)
	if err == nil {
		c.Close()
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		d.t.Errorf("%s: %v, want a refusal", addr, err)
	}
}

// TestDrain: a drained listener refuses connections, keeps its flows, and stays so over a reload.
func TestDrain(t *testing.T) {
	to, web, other := echoes(t), freeaddr.Get(t), freeaddr.Get(t)
	d := startVerbs(t, fmt.Sprintf(`
  - { name: web, listen: [%q], mode: tcp, default: { forward: %q } }
  - { name: other, listen: [%q], mode: http, default: { forward: %q } }`, web, to, other, to))
	flow := dialed(t, web)
	echoed(t, flow)
	d.completes("other web", "drain", "")
	d.completes("", "undrain", "")
	d.counts(`tailsplice_listener_drained{listener="web"} 0`)

	d.says(true, "web is drained, and has 1 open flow\n", "drain", "web")
	d.refuses(web)
	echoed(t, flow)
	echoed(t, flow)
	d.says(true, `"drained": "20`, "drain", "web", "--json")
	d.says(true, "web (tcp) on "+web+": drained since 20", "status")
	d.says(true, `"drained": "20`, "status", "--json")
	d.completes("other", "drain", "")
	d.completes("web", "undrain", "")
	d.counts(`tailsplice_listener_drained{listener="web"} 1`)
	d.ready(200, "ready\ndrained, until `tailsplice undrain`: web\n")
	d.reload()
	d.refuses(web)
	d.says(true, "drained since", "status")

	d.says(true, "other is drained, and has 0 open flows\n", "drain", "--all")
	d.refuses(other)
	d.ready(503, "not ready\ndrained, until `tailsplice undrain`: web, other\n")

	// An address that another program has taken meanwhile.
	taken := listen(t, web)
	d.says(false, `listener "web" is not drained, and can't be bound yet: it is tried again each second: listen on `+web+": the port is in use", "undrain", "web")
	d.ready(503, "address "+web+" of listener web: ")
	taken.Close()
	wait(t, "it is bound again", func() error {
		c, err := net.Dial("tcp", web)
		if err == nil {
			c.Close()
		}
		return err
	})
	d.says(true, "other is open on "+other+"\n", "undrain", "--all")
	echoed(t, dialed(t, web))
	echoed(t, flow)
	d.ready(200, "ready\n")

	d.says(false, `there is no listener "wep", did you mean "web"?: there are web, other`, "drain", "wep")
	for _, wrong := range [][]string{{"drain"}, {"undrain"}, {"drain", "web", "--all"}, {"drain", "web", "other"}} {
		if out, err := d.ask(wrong...); !strings.Contains(out, "name one listener, or use --all") || err == nil || err.Error() != "exit status 2" {
			t.Errorf("%q: %v, %s", wrong, err, out)
		}
	}
	for _, line := range []string{`"change":"drain listener=web","uid":`, `"change":"undrain listener=web","uid":`, `"change":"drain all=true","uid":`} {
		if !strings.Contains(d.logged(), line) {
			t.Errorf("the log has no %s", line)
		}
	}
}

// TestDrainEnd: the daemon refuses connections, and ends with its last flow; the command waits for that.
func TestDrainEnd(t *testing.T) {
	web := freeaddr.Get(t)
	dir := t.TempDir()
	config, control := filepath.Join(dir, "edge.yaml"), filepath.Join(dir, "control.sock")
	check(t, os.WriteFile(config, fmt.Appendf(nil, "listeners: [{ name: web, listen: [%q], mode: tcp, default: { forward: %q } }]\ncontrol: { socket: %q }\n",
		web, echoes(t), control), 0o600))
	run := exec.Command("tailsplice", "run", "--config", config, "--drain-timeout", "1ms")
	run.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	systemd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	check(t, err)
	defer systemd.Close()
	heard := make(chan string, 1)
	go func() { // all the time: the kernel queues a few messages only
		told, b := "", make([]byte, 64<<10)
		for !strings.HasSuffix(told, "END") {
			n, err := systemd.Read(b)
			if err != nil {
				break
			}
			told += string(b[:n])
		}
		heard <- told
	}()
	run.Env = append(os.Environ(), "NOTIFY_SOCKET="+systemd.LocalAddr().String())
	check(t, run.Start())
	ended := make(chan error, 1)
	go func() { ended <- run.Wait() }()
	t.Cleanup(func() { run.Process.Kill() })
	d := &verbsDaemon{t: t, control: control}
	wait(t, "the daemon answers", func() error { _, err := d.ask("status"); return err })
	if out, err := d.ask("drain", "web", "--end"); err == nil || err.Error() != "exit status 2" || !strings.Contains(out, "add --all") {
		t.Errorf("one listener: %v, %s", err, out)
	}
	flow := dialed(t, web)
	echoed(t, flow)
	said := make(chan string, 1)
	go func() {
		out, err := d.ask("drain", "--all", "--end")
		said <- fmt.Sprint(out, err)
	}()
	wait(t, "it is drained", func() error { // a connection that asks whether it is would be one more flow
		if out, err := d.ask("status"); err != nil || !strings.Contains(out, "drained since") {
			return fmt.Errorf("%v: %s", err, out)
		}
		return nil
	})
	d.refuses(web)
	d.says(false, "the daemon is stopping", "undrain", "web")
	d.says(false, "the daemon is shutting down", "upgrade")
	echoed(t, flow)
	select {
	case err := <-ended:
		t.Fatalf("it ended before its last flow: %v", err)
	case out := <-said:
		t.Fatalf("the command did not wait: %s", out)
	default:
	}
	flow.Close()
	check(t, <-ended)
	// systemd would kill a daemon that says it stops after TimeoutStopSec.
	marker, err := net.Dial("unixgram", systemd.LocalAddr().String())
	check(t, err)
	defer marker.Close()
	_, err = marker.Write([]byte("END"))
	check(t, err)
	if told := <-heard; !strings.Contains(told, "READY=1") || strings.Contains(told, "STOPPING=1") {
		t.Errorf("systemd was told %q", told)
	}
	if out := <-said; out != "web is drained, and has 1 open flow\nthe daemon has ended\n<nil>" {
		t.Errorf("%q", out)
	}
}
