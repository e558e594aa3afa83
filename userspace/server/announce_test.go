package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// announced is a daemon whose listener web tells others by a file, with what is said of a listener of its own.
type announced struct {
	*daemon
	file, addr, target string
	options            string // of announce, beside file
}

func (a *announced) yaml(more string) string {
	return fmt.Sprintf(`
listeners:
  - { name: web, listen: [%q], mode: tcp, default: { forward: %q }, announce: { file: %q%s }%s }
`, a.addr, a.target, a.file, a.options, more)
}

func (a *announced) isUp() bool {
	_, err := os.Stat(a.file)
	return err == nil
}

// accepts says whether who connects is served or at least accepted.
func accepts(addr string) bool {
	c, err := net.Dial("tcp", addr)
	if err == nil {
		c.Close()
	}
	return err == nil
}

func announcedListener(t *testing.T, options string) *announced {
	return &announced{file: filepath.Join(t.TempDir(), "web.up"), addr: freeAddr(t), target: freeAddr(t), options: options}
}

// TestAnnounced: others are told that a listener should get connections while it is bound, its default answers,
// and it is not drained.
func TestAnnounced(t *testing.T) {
	a := announcedListener(t, ", grace: 0s")
	if err := os.WriteFile(a.file, nil, 0o600); err != nil { // of one that was killed
		t.Fatal(err)
	}
	other, err := net.Listen("tcp", a.addr)
	if err != nil {
		t.Fatal(err)
	}
	a.daemon = start(t, a.yaml(", while_down: close"))
	is := func(up bool, why string) {
		t.Helper()
		eventually(t, fmt.Sprintf("announced: %t, %s", up, why), func() bool {
			l := a.Status().Listeners[0]
			return a.isUp() == up && l.Announced == map[bool]string{true: "up", false: "down"}[up] && strings.Contains(l.NotAnnounced, why)
		})
	}
	is(false, "")
	ln, err := net.Listen("tcp", a.target)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	eventually(t, "another program has its address", func() bool { return a.has(PartAddress, a.addr, "in use") })
	is(false, "the port is in use")
	other.Close()
	is(true, "")
	if !accepts(a.addr) {
		t.Error("it is announced, and does not accept")
	}
	web := url.Values{"listener": {"web"}}
	if _, err := a.SetDrained(web, true); err != nil {
		t.Fatal(err)
	}
	is(false, "the listener is drained")
	eventually(t, "it is closed", func() bool { return !accepts(a.addr) })
	if _, err := a.SetDrained(web, false); err != nil {
		t.Fatal(err)
	}
	is(true, "")
	ln.Close()
	is(false, "the target refused the connection")
	if ln, err = net.Listen("tcp", a.target); err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	is(true, "")

	// A reload moves the file, has another mode, and ends it.
	old := a.file
	a.file = filepath.Join(t.TempDir(), "moved.up")
	if err := a.Reload(parse(t, a.yaml(", while_down: close"))); err != nil {
		t.Fatal(err)
	}
	is(true, "")
	if _, err := os.Stat(old); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the old file: %v", err)
	}
	if err := a.Reload(parse(t, strings.Replace(a.yaml(""), "mode: tcp", "mode: sni", 1))); err != nil {
		t.Fatal(err)
	}
	is(true, "")
	if err := a.Reload(parse(t, strings.Replace(a.yaml(""), "name: web", "name: renamed", 1))); err != nil {
		t.Fatal(err)
	}
	is(true, "")
	if err := a.Reload(parse(t, fmt.Sprintf("listeners: [{ listen: [%q], mode: tcp, default: { forward: %q } }]", a.addr, a.target))); err != nil {
		t.Fatal(err)
	}
	eventually(t, "nobody is told any more", func() bool { return !a.isUp() })
}

// TestAnnouncedBefore: what another process has announced, and is configured no more or otherwise, is
// withdrawn.
func TestAnnouncedBefore(t *testing.T) {
	for name, then := range map[string]func(a *announced, said string) string{
		"announce is gone": func(a *announced, _ string) string {
			return fmt.Sprintf("listeners: [{ name: web, listen: [%q], mode: tcp, default: { forward: %q } }]", a.addr, a.target)
		},
		"the listener is gone": func(a *announced, _ string) string {
			return fmt.Sprintf("listeners: [{ name: other, listen: [%q], mode: tcp, default: { forward: %q } }]", a.addr, a.target)
		},
		"otherwise": func(a *announced, said string) string {
			a.file += ".new"
			a.options = fmt.Sprintf(`, up: [sh, -c, "echo new up >>%s"], down: ["true"]`, said)
			return a.yaml("")
		},
		"renamed": func(a *announced, _ string) string {
			return strings.Replace(a.yaml(""), "name: web", "name: renamed", 1)
		},
	} {
		t.Run(name, func(t *testing.T) {
			said := filepath.Join(t.TempDir(), "said")
			a := announcedListener(t, fmt.Sprintf(`, up: [sh, -c, "echo up >>%s"], down: [sh, -c, "echo down >>%s"]`, said, said))
			a.daemon = start(t, a.yaml(""))
			file := a.file
			tells := func(want string) {
				t.Helper()
				eventually(t, "others are told: "+want, func() bool {
					b, _ := os.ReadFile(said)
					return strings.Join(strings.Fields(string(b)), " ") == want
				})
			}
			tells("up")
			orders, err := a.Orders()
			if err != nil {
				t.Fatal(err)
			}
			a.Leave()
			d := startOptions(t, parse(t, then(a, said)), Options{Orders: orders})
			want := map[string]string{"otherwise": "up down new up", "renamed": "up up"}[name]
			if want == "" {
				want = "up down"
			}
			tells(want)
			eventually(t, "the file is as it is to be", func() bool {
				_, err := os.Stat(file)
				return (err == nil) == (name == "renamed")
			})
			orders, err = d.Orders()
			if err != nil {
				t.Fatal(err)
			}
			if says := strings.Contains(string(orders), said); says != (name == "otherwise" || name == "renamed") {
				t.Errorf("the next process is told %s", orders)
			}
		})
	}
}

// TestGrace: an announcement is withdrawn before the sockets close, by drain and at the end. Who comes in
// between is accepted.
func TestGrace(t *testing.T) {
	// The program says when it has begun, and ends when it is let.
	dir := t.TempDir()
	begun, may := filepath.Join(dir, "begun"), filepath.Join(dir, "may")
	down := fmt.Sprintf("if [ -e %s.armed ]; then echo >>%s; while [ ! -e %s ]; do sleep 0.01; done; fi", begun, begun, may)
	a := announcedListener(t, fmt.Sprintf(`, grace: 50ms, timeout: 1m, up: ["true"], down: [sh, -c, %q]`, down))
	// A moment passes between drained and withdrawn.
	a.daemon = startOptions(t, parse(t, a.yaml("")), Options{Moved: func() { time.Sleep(20 * time.Millisecond) }})
	eventually(t, "it is announced", a.isUp)
	touch := func(name string) {
		t.Helper()
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	touch(begun + ".armed")
	withdraws := func(how string) {
		t.Helper()
		eventually(t, how+": it is withdrawn", func() bool { b, _ := os.ReadFile(begun); return len(b) == 1 && !a.isUp() })
		time.Sleep(150 * time.Millisecond) // the grace, which has not begun, and more
		if !accepts(a.addr) {
			t.Errorf("%s: it is closed before others know", how)
		}
		touch(may)
		eventually(t, how+": it is closed", func() bool { return !accepts(a.addr) })
		os.Remove(begun)
		os.Remove(may)
	}
	web := url.Values{"listener": {"web"}}
	got, err := a.SetDrained(web, true)
	if err != nil || len(got.Listeners[0].Bound) != 1 {
		t.Errorf("%+v, %v", got, err)
	}
	withdraws("drained")
	if _, err := a.SetDrained(web, false); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is announced again", a.isUp)
	ended := make(chan error, 1)
	go func() { ended <- a.Drain(context.Background()) }()
	eventually(t, "it says that it ends", func() bool { return a.Ready().Draining })
	if _, err := a.SetDrained(web, false); err == nil {
		t.Error("a daemon that ends is opened")
	}
	withdraws("at the end")
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestGraceOver: a listener that was drained has the rest of its grace in a process that takes over, or all of
// it where others did not know yet.
func TestGraceOver(t *testing.T) {
	for name, c := range map[string]struct {
		hangs bool          // what tells others, in the old process
		rest  time.Duration // of the grace, for the new one
		grace string        // of the new one, where it is another
	}{
		"the most of it":        {false, 5 * time.Minute, ""},
		"little":                {false, 100 * time.Millisecond, ""},
		"others know late":      {true, 0, "100ms"},
		"the clock is set back": {false, time.Hour, "100ms"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			hangs := filepath.Join(dir, "hangs")
			a := announcedListener(t, fmt.Sprintf(`, grace: 10m, timeout: 1m, up: ["true"], down: [sh, -c, %q]`, "if [ -e "+hangs+" ]; then sleep 60; fi"))
			a.daemon = start(t, a.yaml(""))
			eventually(t, "it is announced", a.isUp)
			if c.hangs {
				if err := os.WriteFile(hangs, nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := a.SetDrained(url.Values{"listener": {"web"}}, true); err != nil {
				t.Fatal(err)
			}
			until := func(d *daemon) time.Time {
				d.mu.Lock()
				defer d.mu.Unlock()
				return d.listeners["web"].until
			}
			if !c.hangs {
				eventually(t, "its grace has begun", func() bool { return !until(a.daemon).IsZero() })
				a.mu.Lock()
				a.listeners["web"].until = time.Now().Add(c.rest)
				a.mu.Unlock()
			}
			sockets, err := a.Sockets()
			if err != nil {
				t.Fatal(err)
			}
			said, err := a.Orders()
			if err != nil {
				t.Fatal(err)
			}
			os.Remove(hangs)
			if c.grace != "" {
				a.options = strings.Replace(a.options, "grace: 10m", "grace: "+c.grace, 1)
			}
			next := startOptions(t, parse(t, a.yaml("")), Options{Handed: sockets, Orders: said, Held: true})
			a.Pause()
			took := time.Now()
			next.Accept()
			a.Leave()
			if c.grace == "" && c.rest > time.Minute {
				if err := next.Reload(parse(t, a.yaml(""))); err != nil {
					t.Fatal(err)
				}
				if !accepts(a.addr) || !until(next).Equal(until(a.daemon)) {
					t.Errorf("it accepts: %t, until %v, and in the old one until %v", accepts(a.addr), until(next), until(a.daemon))
				}
				return
			}
			eventually(t, "it is closed", func() bool { return !accepts(a.addr) })
			if c.hangs && time.Since(took) < 100*time.Millisecond {
				t.Errorf("it was closed after %v", time.Since(took))
			}
		})
	}
}

// TestAnnouncedInOrder: what is announced by other programs, and for a listener of another name, is announced
// when what comes before is withdrawn: both may be of the same. This is so for a reload, for one more while that
// goes on, and for a process that takes over.
func TestAnnouncedInOrder(t *testing.T) {
	for _, how := range []string{"reload", "reloads", "upgrade"} {
		t.Run(how, func(t *testing.T) {
			dir := t.TempDir()
			said, may := filepath.Join(dir, "said"), filepath.Join(dir, "may")
			a := announcedListener(t, "")
			file := a.file
			named := func(name string) string {
				down := fmt.Sprintf("echo %s withdraws >>%s; while [ ! -e %s ]; do sleep 0.01; done; echo %s down >>%s", name, said, may, name, said)
				a.file = file + name
				a.options = fmt.Sprintf(`, grace: 0s, timeout: 1m, up: [sh, -c, "echo %s up >>%s"], down: [sh, -c, %q]`, name, said, down)
				return strings.Replace(a.yaml(""), "name: web", "name: "+name, 1)
			}
			tells := func(want string) {
				t.Helper()
				eventually(t, "others are told: "+want, func() bool {
					b, _ := os.ReadFile(said)
					return strings.Join(strings.Fields(string(b)), " ") == want
				})
			}
			a.daemon = start(t, named("a"))
			tells("a up")
			if how == "upgrade" {
				orders, err := a.Orders()
				if err != nil {
					t.Fatal(err)
				}
				a.Leave()
				startOptions(t, parse(t, named("b")), Options{Orders: orders})
			} else if err := a.Reload(parse(t, named("b"))); err != nil {
				t.Fatal(err)
			}
			tells("a up a withdraws")
			if how == "reloads" {
				if err := a.Reload(parse(t, named("c"))); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(100 * time.Millisecond) // far longer than it takes to tell
			tells("a up a withdraws")
			if _, err := os.Stat(a.file); err == nil {
				t.Error("there is the file of the new one already")
			}
			if err := os.WriteFile(may, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			tells(map[string]string{
				"reloads": "a up a withdraws a down b withdraws b down c up",
			}[how] + map[bool]string{true: "a up a withdraws a down b up"}[how != "reloads"])
		})
	}
}

// TestWithdrawn: who is to take over can wait for what is withdrawn since it is no longer configured.
func TestWithdrawn(t *testing.T) {
	may := filepath.Join(t.TempDir(), "may")
	a := announcedListener(t, fmt.Sprintf(`, timeout: 1m, up: ["true"], down: [sh, -c, "while [ ! -e %s ]; do sleep 0.01; done"]`, may))
	a.daemon = start(t, a.yaml(""))
	eventually(t, "it is announced", a.isUp)
	if err := a.Withdrawn(t.Context()); err != nil {
		t.Error(err)
	}
	if err := a.Reload(parse(t, fmt.Sprintf("listeners: [{ name: web, listen: [%q], mode: tcp, default: { forward: %q } }]", a.addr, a.target))); err != nil {
		t.Fatal(err)
	}
	why := errors.New("no more time")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	if err := a.Withdrawn(ctx); !errors.Is(err, why) {
		t.Errorf("%v, want %v", err, why)
	}
	if err := os.WriteFile(may, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := a.Withdrawn(t.Context()); err != nil || a.isUp() {
		t.Errorf("%v; it is announced: %t", err, a.isUp())
	}
	for range 50 {
		if err := a.Withdrawn(ctx); err != nil {
			t.Fatalf("it is withdrawn, and the time is over: %v", err)
		}
	}
}

// TestAnnounceFails: a program that fails is a problem, which neither closes the listener nor makes it unready.
func TestAnnounceFails(t *testing.T) {
	a := announcedListener(t, `, up: [sh, -c, "echo no such protocol; exit 1"], down: ["true"]`)
	a.daemon = start(t, a.yaml(""))
	eventually(t, "it is a problem", func() bool { return a.has(PartAnnounce, "", "no such protocol") })
	if !a.Ready().Ready || !accepts(a.addr) {
		t.Errorf("%s", a.Ready())
	}
}

// TestAnnouncedOver: while another process takes over, nothing is withdrawn, whether that succeeds or not.
func TestAnnouncedOver(t *testing.T) {
	downs := filepath.Join(t.TempDir(), "downs")
	a := announcedListener(t, fmt.Sprintf(`, grace: 0s, up: ["true"], down: [sh, -c, %q]`, "echo >>"+downs))
	a.daemon = start(t, a.yaml(""))
	eventually(t, "it is announced", a.isUp)
	stays := func(what string) {
		t.Helper()
		if b, _ := os.ReadFile(downs); len(b) > 0 || !a.isUp() {
			t.Fatalf("%s: it was withdrawn", what)
		}
	}
	takeOver := func() *daemon {
		t.Helper()
		sockets, err := a.Sockets()
		if err != nil {
			t.Fatal(err)
		}
		return startOptions(t, parse(t, a.yaml("")), Options{Handed: sockets, Held: true})
	}
	next := takeOver()
	a.Pause()
	next.Close() // it fails
	a.Resume()
	stays("an upgrade that failed")
	next = takeOver()
	a.Pause()
	next.Accept()
	a.Leave()
	if err := a.Drain(t.Context()); err != nil {
		t.Error(err)
	}
	eventually(t, "the new one has told", func() bool { return next.Status().Listeners[0].Announced == "up" })
	stays("an upgrade")
	next.Close()
	if b, _ := os.ReadFile(downs); len(b) != 1 || a.isUp() {
		t.Errorf("the new one's end: %q", b)
	}
}
