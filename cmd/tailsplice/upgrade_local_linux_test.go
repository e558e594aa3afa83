package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/loader"
	"github.com/tailsplice/tailsplice/test/cgroup"
	"github.com/tailsplice/tailsplice/test/freeaddr"
	"github.com/tailsplice/tailsplice/userspace/flow"
)

// startLocal starts a daemon whose flows go past TCP to an echo server on this host, and waits until one
// does. past are those that do, and all. more are further listeners.
func startLocal(t *testing.T, more string) (d *upgradable, dial func() net.Conn, past func() (n int, all map[string]flow.Snapshot)) {
	needRoot(t)
	target, _ := cgroup.Listen(t, "tcp4")
	go func() {
		for c, err := target.Accept(); err == nil; c, err = target.Accept() {
			go func() {
				defer c.Close()
				_, _ = io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c}) // as people read who are past TCP
			}()
		}
	}()
	dir, err := os.MkdirTemp("", "ts-up-")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	d = &upgradable{t: t, dir: dir, config: filepath.Join(dir, "edge.yaml"), control: filepath.Join(dir, "control.sock"),
		edge: freeaddr.Of(t, "127.0.0.77")}
	check(t, os.WriteFile(d.config, fmt.Appendf(nil, `
listeners:
  - { name: edge, listen: [%q], mode: tcp, default: { forward: %q, datapath: sk_msg } }
%scontrol: { socket: %q }
`, d.edge, target.Addr(), more, d.control), 0o600))
	d.start()
	past = func() (n int, all map[string]flow.Snapshot) {
		all = map[string]flow.Snapshot{}
		for _, f := range d.flows() {
			if all[f.ID] = f; f.Datapath == loader.LocalName {
				n++
			}
		}
		return n, all
	}
	dial = func() net.Conn {
		c, err := net.Dial("tcp", d.edge)
		check(t, err)
		t.Cleanup(func() { c.Close() })
		check(t, echo(c))
		return c
	}
	wait(t, "a flow goes past TCP", func() error {
		dial()
		if n, all := past(); n == 0 {
			return fmt.Errorf("none of %d does", len(all))
		}
		return nil
	})
	return d, dial, past
}

// TestUpgradeLocalBegins: flows that begin in the new process go past TCP as well, while the old one goes on
// with a request.
func TestUpgradeLocalBegins(t *testing.T) {
	asked, answer := make(chan struct{}), make(chan struct{})
	slow := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(asked)
		<-answer
		fmt.Fprint(w, "hello")
	}))
	defer slow.Close()
	web := freeaddr.Get(t)
	d, dial, past := startLocal(t, fmt.Sprintf("  - { name: web, listen: [%q], mode: http, default: { forward: %q } }\n", web, slow.Listener.Addr()))
	answered := make(chan error, 1)
	go func() { answered <- getHello("http://" + web) }()
	<-asked
	if out, err := d.ask("upgrade"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	_, before := past()
	var newest []net.Conn
	wait(t, "most flows that begin now go past TCP", func() error {
		newest = append(newest, dial())
		for _, c := range newest {
			check(t, echo(c))
		}
		n, all := past()
		for id := range before {
			if all[id].Datapath == loader.LocalName {
				n--
			}
			delete(all, id)
		}
		if len(all) < 10 || n < len(all)/2 {
			return fmt.Errorf("%d of %d do", n, len(all))
		}
		return nil
	})
	if s := d.status(); len(s.Older) != 1 {
		t.Errorf("the older processes are %+v", s.Older)
	}
	close(answer)
	check(t, <-answered)
}

// TestUpgradeLocal: flows that go past TCP to a process on this host go over to the new process whole, idle
// ones, small messages and bulk both ways, and go past TCP again; and the old process ends.
func TestUpgradeLocal(t *testing.T) {
	d, dial, past := startLocal(t, "")
	_, begun := past()
	var idle []net.Conn
	for range 20 {
		idle = append(idle, dial())
	}
	streams := []*stream{startStream(t, d.edge), startStream(t, d.edge)}
	chats := []func() time.Duration{chatter(t, d.edge), chatter(t, d.edge)}
	var shown map[string]flow.Snapshot
	wait(t, "all flows are shown", func() (err error) {
		n := 0
		if n, shown = past(); len(shown) != len(begun)+len(idle)+4 || n < 15 {
			err = fmt.Errorf("%d are, and %d of them go past TCP, of %d", len(shown), n, len(begun)+len(idle)+4)
		}
		return err
	})
	for i := range 3 {
		began := time.Now()
		if out, err := d.ask("upgrade"); err != nil || !strings.Contains(out, "has taken over from") {
			t.Fatalf("upgrade: %v: %s", err, out)
		}
		wait(t, "the older process ends", func() error {
			if s, pids := d.status(), d.processes(); len(s.Older) > 0 || len(pids) != 2 {
				return fmt.Errorf("status has %+v, and the processes are %v", s.Older, pids)
			}
			return nil
		})
		n, all := past()
		t.Logf("upgrade %d: the older process had ended after %v; of %d flows %d go past TCP", i+1,
			time.Since(began).Round(time.Millisecond), len(all), n)
		for id, was := range shown {
			if f, isThere := all[id]; !isThere || !f.Started.Equal(was.Started) || f.BytesUp < was.BytesUp || f.Upstream != was.Upstream {
				t.Errorf("a flow that was shown as %+v is shown as %+v", was, f)
			}
		}
		wait(t, "most flows go past TCP again", func() error {
			for _, c := range idle {
				check(t, echo(c))
			}
			if n, all := past(); n < len(all)/2 {
				return fmt.Errorf("%d of %d do", n, len(all))
			}
			return nil
		})
	}
	for _, s := range streams {
		s.stop(t)
	}
	for _, stop := range chats {
		t.Logf("the longest of small messages took %v", stop())
	}
	if left := strings.Fields(generations(d)); len(left) > 1 {
		t.Errorf("pins are left: %v", left)
	}
}
