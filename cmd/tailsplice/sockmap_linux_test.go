package main

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/test/cgroup"
	"github.com/tailsplice/tailsplice/test/freeaddr"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/server"
)

// TestSockmapAgrees: what `tailsplice flows` says of a flow that is spliced in the kernel, what bpftool finds in the pinned map, what
// TCP_INFO says of the sockets of both ends and what these have counted is the same, to the byte, hello and all.
func TestSockmapAgrees(t *testing.T) {
	needRoot(t)
	t.Run("sockmap", func(t *testing.T) { testAgrees(t, "sockmap", "sockmap", listen(t, "127.0.0.1:0")) })
	t.Run("auto", func(t *testing.T) { testAgrees(t, "auto", "sockmap", listen(t, "127.0.0.1:0")) })
	t.Run("sk_msg", func(t *testing.T) {
		server, _ := cgroup.Listen(t, "tcp4")
		testAgrees(t, "sk_msg", "sk_msg", server)
	})
}

// testAgrees has a flow of a route whose configuration says word, until datapath has it.
func testAgrees(t *testing.T, word, datapath string, target net.Listener) {
	at, metrics := freeaddr.Get(t), freeaddr.Get(t)
	dir, err := os.MkdirTemp("", "ts-cli-")
	check(t, err)
	defer os.RemoveAll(dir)
	control, file := filepath.Join(dir, "control.sock"), filepath.Join(dir, "edge.yaml")
	check(t, os.WriteFile(file, fmt.Appendf(nil, `
listeners:
  - { name: web, listen: [%q], mode: sni, default: { forward: %q, datapath: %s } }
control: { socket: %q, metrics: %q }
`, at, target.Addr(), word, control, metrics), 0o600))

	var log strings.Builder
	daemon := exec.Command("tailsplice", "run", "--config", file)
	daemon.Stderr = &log
	daemon.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	check(t, daemon.Start())
	defer func() {
		_ = daemon.Process.Signal(syscall.SIGINT)
		if err := daemon.Wait(); err != nil {
			t.Errorf("%v\n%s", err, log.String())
		}
	}()
	read := func(v any, noun string) error {
		out, err := exec.Command("tailsplice", noun, "--json", "--control", control).Output()
		if err != nil {
			return err
		}
		return json.Unmarshal(out, v)
	}
	var status server.Status
	wait(t, "the daemon answers", func() error { return read(&status, "status") })

	var client, upstream net.Conn
	var f flow.Snapshot
	var up, down []byte
	defer func() { client.Close(); upstream.Close() }()
	say := func(from, to net.Conn, heard *[]byte, n int) {
		data, sent := noise(n), make(chan error, 1)
		go func() { _, err := from.Write(data); sent <- err }()
		arrives(t, to, data)
		check(t, <-sent)
		*heard = append(*heard, data...)
	}
	wait(t, "a flow is spliced", func() error { // the first to a target is never past TCP, it is how the target becomes known
		if client != nil {
			client.Close()
			upstream.Close()
		}
		client, upstream, up = connect(t, at, target)
		down = nil
		for end := time.Now().Add(time.Second); word == "auto" && time.Now().Before(end); {
			say(client, upstream, &up, 100)
			say(upstream, client, &down, 100)
		}
		var all []flow.Snapshot
		if err := read(&all, "flows"); err != nil {
			return err
		}
		if len(all) != 1 || all[0].Datapath != datapath {
			return fmt.Errorf("%+v", all)
		}
		f = all[0]
		return nil
	})
	say(upstream, client, &down, 100)
	wait(t, "bpftool sees what was moved outside of the sockmap", func() error { // within a second
		if e := pinned(t, f.ID); e.Up.Bytes != int64(len(up)) || e.Down.Bytes != int64(len(down)) {
			return fmt.Errorf("%d bytes up, %d down: %+v", len(up), len(down), e)
		}
		return nil
	})
	for range 10 { // until the flow is in it
		say(client, upstream, &up, 100)
		say(upstream, client, &down, 100)
	}
	say(client, upstream, &up, 1_234_567)
	say(upstream, client, &down, 7_654_321)
	wait(t, "flows has all", func() error {
		var all []flow.Snapshot
		if err := read(&all, "flows"); err != nil {
			return err
		}
		if len(all) != 1 || all[0].BytesUp != int64(len(up)) || all[0].BytesDown != int64(len(down)) || all[0].Datapath != datapath {
			return fmt.Errorf("%d bytes up, %d down: %+v", len(up), len(down), all)
		}
		f = all[0]
		return nil
	})
	var e entry
	wait(t, "bpftool sees all", func() error { // the flow may have left the sockmap again: within a second
		if e = pinned(t, f.ID); e.Up.Bytes != int64(len(up)) || e.Down.Bytes != int64(len(down)) {
			return fmt.Errorf("%d bytes up, %d down: %+v", len(up), len(down), e)
		}
		return nil
	})
	if e.Up.Bytes != int64(len(up)) || e.Down.Bytes != int64(len(down)) || e.Up.Before+e.Up.Redirected+e.Up.Passed+e.Up.Local != e.Up.Bytes ||
		e.Down.Before+e.Down.Redirected+e.Down.Passed+e.Down.Local != e.Down.Bytes || e.Up.Redirected+e.Up.Local == 0 || e.Up.Before == 0 ||
		(e.Up.Local+e.Down.Local > 0) != (datapath == "sk_msg") {
		t.Errorf("%d bytes up, %d down: bpftool shows %+v", len(up), len(down), e)
	}
	if e.Downstream != f.Downstream || e.Upstream != f.Upstream || e.Route != "web/"+f.Route && e.Route != f.Route || e.State != "FLOW_SPLICED" {
		t.Errorf("flows says %+v, bpftool %+v", f, e)
	}
	for name, c := range map[string]net.Conn{"client": client, "server": upstream} {
		out, in := len(up), len(down)
		if name == "server" && datapath == "sk_msg" {
			continue // TCP_INFO there doesn't see what came past TCP
		}
		if name == "server" {
			out, in = in, out
		}
		wait(t, "TCP_INFO agrees", func() error { // what is acknowledged comes last
			i := info(t, c)
			if syn := i.Bytes_acked - uint64(out); syn > 1 || i.Bytes_received != uint64(in) {
				return fmt.Errorf("%s sent %d and received %d, TCP_INFO says %d and %d", name, out, in, i.Bytes_acked, i.Bytes_received)
			}
			return nil
		})
	}

	check(t, read(&status, "status"))
	for _, d := range status.Datapaths {
		if d.Name == datapath && !d.Available || d.Stalls != 0 || d.SwitchedOff {
			t.Errorf("%+v", d)
		}
	}
	res, err := http.Get("http://" + metrics + "/metrics")
	check(t, err)
	body, err := io.ReadAll(res.Body)
	res.Body.Close()
	check(t, err)
	for _, want := range []string{`tailsplice_datapath_stalls_total{datapath="` + datapath + `"} 0`, `tailsplice_datapath_on{datapath="` + datapath + `"} 1`} {
		if !strings.Contains(string(body), want) {
			t.Errorf("no %q in the metrics", want)
		}
	}
}

// entry is a flow as bpftool prints it.
type entry struct {
	ID, Route, Downstream, Upstream, State string
	Up, Down                               struct{ Bytes, Before, Redirected, Passed, Local int64 }
}

// pinned finds a flow in the maps that the daemons of this machine have pinned.
func pinned(t *testing.T, id string) entry {
	t.Helper()
	maps, err := filepath.Glob("/sys/fs/bpf/tailsplice/*/current/flows")
	check(t, err)
	bpftool := "bpftool"
	if _, err := exec.LookPath(bpftool); err != nil {
		bpftool = "/usr/sbin/bpftool"
	}
	for _, m := range maps {
		out, err := exec.Command(bpftool, "-j", "map", "dump", "pinned", m).Output()
		if err != nil {
			continue // another daemon's, which has just ended
		}
		var dump []struct{ Formatted struct{ Value entry } }
		check(t, json.Unmarshal(out, &dump))
		for _, d := range dump {
			if d.Formatted.Value.ID == id {
				return d.Formatted.Value
			}
		}
	}
	t.Fatalf("no flow %s in %v", id, maps)
	return entry{}
}

// connect makes a flow, of which the server has got the hello that it gives.
func connect(t *testing.T, at string, server net.Listener) (client, upstream net.Conn, said []byte) {
	t.Helper()
	client, err := net.Dial("tcp", at)
	check(t, err)
	b := hello(t)
	_, err = client.Write(b)
	check(t, err)
	upstream, err = server.Accept()
	check(t, err)
	arrives(t, upstream, b)
	return client, upstream, b
}

func info(t *testing.T, c net.Conn) *unix.TCPInfo {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	check(t, err)
	var i *unix.TCPInfo
	check(t, raw.Control(func(fd uintptr) { i, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) }))
	check(t, err)
	return i
}

// hello is what a TLS client says first.
func hello(t *testing.T) []byte { return helloOf(t, "www.vsq.cz") }

// helloOf is a ClientHello for a name.
func helloOf(t *testing.T, name string) []byte {
	t.Helper()
	ours, theirs := net.Pipe()
	defer ours.Close()
	go func() { _ = tls.Client(theirs, &tls.Config{ServerName: name}).Handshake(); theirs.Close() }()
	b := make([]byte, 64<<10)
	n, err := ours.Read(b)
	check(t, err)
	return b[:n]
}

func noise(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

func arrives(t *testing.T, c net.Conn, want []byte) {
	t.Helper()
	check(t, c.SetReadDeadline(time.Now().Add(time.Minute)))
	got := make([]byte, len(want))
	if n, err := io.ReadFull(c, got); err != nil || !slices.Equal(got, want) {
		t.Fatalf("%d of %d bytes arrived, %v", n, len(want), err)
	}
}

func listen(t testing.TB, at string) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", at)
	check(t, err)
	t.Cleanup(func() { ln.Close() })
	return ln
}

// wait tries until it works, for up to a minute.
func wait(t testing.TB, what string, try func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err = try(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
