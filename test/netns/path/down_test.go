package path

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// The stand-in for a provider's proxy: it gives connections to edge A while that one's port answers, and else
// to edge B.
const balancer = `
defaults
	mode tcp
	timeout connect 5s
	timeout client 5m
	timeout server 5m
listen edges
	bind 203.0.113.1:443
	default-server check inter 200ms fall 1 rise 1
	server a 198.51.100.2:443
	server b 198.51.100.18:443 backup
`

// TestWhileDown: an edge that loses its tailnet closes its port, so that what is in front of both edges sends
// new connections to the other one: a proxy that checks the port, or a router that hears BGP announcements. A
// connection that is open goes on once the edge is back.
func TestWhileDown(t *testing.T) {
	s := world(t)
	lab.Require(t, lab.Options{}, "haproxy")
	for _, d := range []*lab.Daemon{s.edgeA, s.edgeB} {
		old, err := d.Host.ReadFile(lab.ConfigFile)
		if err != nil {
			t.Fatal(err)
		}
		s.configure(t, d, strings.Replace(string(old), "    mode: sni\n", "    mode: sni\n    while_down: close\n", 1))
	}
	t.Run("a proxy checks the port", func(t *testing.T) {
		const file = "/etc/balancer.cfg"
		if err := s.Inet.WriteFile(file, []byte(balancer), 0o644); err != nil {
			t.Fatal(err)
		}
		proxy, err := s.Inet.StartProcess("haproxy", []string{"haproxy", "-db", "-f", file}, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { proxy.Stop(time.Second) })
		s.losesTailnet(t, "203.0.113.1:443")
	})
	t.Run("an announcement follows the listener", func(t *testing.T) {
		s.announce(t)
		s.losesTailnet(t, net.JoinHostPort(lab.Anycast4.String(), "443"))
	})
}

// announce has edge A announce the anycast addresses as docs/anycast.md says it, while its listener web serves.
func (s *story) announce(t *testing.T) {
	t.Helper()
	edge := s.EdgeA
	config, err := edge.ReadFile(lab.ConfigFile)
	if err != nil {
		t.Fatal(err)
	}
	// control.health is bound at the start only.
	restart := func(config string) {
		t.Helper()
		if err := errors.Join(s.edgeA.SetConfig(config), s.edgeA.Restart(context.Background())); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { restart(string(config)) })
	announced := strings.Replace(string(config), "    mode: sni\n", "    mode: sni\n    announce: { file: /run/tailsplice/web.up }\n", 1)
	restart(announced + "control: { health: \"127.0.0.1:9465\" }\n")

	s.prefer(t, edge) // and afterwards it has its own configuration of bird again
	script := "/etc/announce"
	if err := errors.Join(edge.WriteFile(lab.BirdConfig, documented(t, "/etc/bird/bird.conf"), 0o644),
		edge.WriteFile(script, documented(t, "/usr/local/bin/announce"), 0o755)); err != nil {
		t.Fatal(err)
	}
	if out, err := edge.Command(t.Context(), "birdc", "configure").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	p, err := edge.StartProcess("announce", []string{script}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Stop(time.Second) })
}

// documented is the block of docs/anycast.md that follows the name of a file.
func documented(t *testing.T, file string) []byte {
	t.Helper()
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(filepath.Join(root, "docs/anycast.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(page), "`"+file+"`")
	found := regexp.MustCompile("(?s)^[^`]*\n```\\w*\n(.*?)```").FindStringSubmatch(after)
	if found == nil {
		t.Fatalf("docs/anycast.md does not show %s", file)
	}
	return []byte(found[1])
}

// losesTailnet has edge A lose its tailnet in each way. The clients connect to addr, which leads to edge A as
// long as that one serves.
func (s *story) losesTailnet(t *testing.T, addr string) {
	browser := func(keep bool) *http.Client {
		dial := func(ctx context.Context, _, _ string) (net.Conn, error) { return s.Client.Dial(ctx, "tcp4", addr) }
		return &http.Client{Transport: &http.Transport{DialContext: dial, TLSClientConfig: s.trust(), DisableKeepAlives: !keep}}
	}
	get := func(ctx context.Context, c *http.Client) (f facts, err error) {
		req, err := http.NewRequestWithContext(ctx, "GET", "https://"+lab.Site+"/", nil)
		if err != nil {
			return f, err
		}
		req.Header.Set("Accept", "application/json")
		res, err := c.Do(req)
		if err != nil {
			return f, err
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		if err != nil || res.StatusCode != 200 {
			return f, fmt.Errorf("%s: %s, %v", res.Status, body, err)
		}
		return f, json.Unmarshal(body, &f)
	}
	// by waits for a page that came by an edge.
	by := func(d *lab.Daemon) {
		t.Helper()
		eventually(t, "a page by "+d.Host.Name, func() error {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			f, err := get(ctx, browser(false))
			if err != nil {
				return err
			}
			return logged(d, f.Path)
		})
	}
	for _, c := range []struct {
		name       string
		lose, back func() error
		flows      bool // those that there are go on when the tailnet is back
	}{
		{"tailscaled ends", func() error { s.EdgeA.Node.Stop(); return nil }, func() error {
			return errors.Join(s.EdgeA.Node.Start(), s.EdgeA.Node.Wait(t.Context()))
		}, false},
		{"packets vanish", func() error { return s.EdgeA.Node.Process().Signal(syscall.SIGSTOP) },
			func() error { return s.EdgeA.Node.Process().Signal(syscall.SIGCONT) }, true},
	} {
		// once says how long it took until edge B served.
		once := func(t *testing.T) (served time.Duration) {
			t.Helper()
			by(s.edgeA)
			kept := browser(true)
			defer kept.CloseIdleConnections()
			if _, err := get(t.Context(), kept); err != nil {
				t.Fatal(err)
			}
			back := sync.OnceValue(c.back)
			t.Cleanup(func() { back() })
			lost := time.Now()
			if err := c.lose(); err != nil {
				t.Fatal(err)
			}
			took, f, err := firstPage(t.Context(), func(ctx context.Context) (facts, error) { return get(ctx, browser(false)) })
			if err != nil {
				t.Fatal(err)
			}
			served = time.Since(lost)
			t.Logf("a new connection was served %v after it began, %v after the tailnet was lost", took, served.Round(time.Millisecond))
			flowOf(t, s.edgeB, f.Path)
			out, err := s.edgeA.CLI(t.Context(), "status")
			if err != nil || !strings.Contains(string(out), "closed, until a target of default answers") ||
				!strings.Contains(string(out), "problem: default tailnet://home:443 of listener web: ") {
				t.Errorf("status of edge A: %v\n%s", err, out)
			}
			if err := back(); err != nil {
				t.Fatal(err)
			}
			by(s.edgeA)
			if !c.flows {
				return served
			}
			reused := false
			ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) { reused = i.Reused }})
			if _, err := get(ctx, kept); err != nil || !reused {
				t.Errorf("the connection from before: reused %t, %v", reused, err)
			}
			return served
		}
		t.Run(c.name, func(t *testing.T) {
			// It takes up to 2.5 s, and a machine that is busy at that moment may be late for once.
			for tries := 1; once(t) > takeover; tries++ {
				if tries == 3 {
					t.Fatalf("edge B serves later than %v each time", takeover)
				}
			}
		})
	}
}

// takeover is within what time edge B serves new connections in place of an edge A that can't.
const takeover = 3 * time.Second

// logged is an error while the daemon's log has no flow of a path id.
func logged(d *lab.Daemon, id string) error {
	for _, l := range d.LogLines() {
		if l["msg"] == "flow ended" && l["id"] == id {
			return nil
		}
	}
	return fmt.Errorf("%s logs no flow %s", d.Host.Name, id)
}

// firstPage asks again and again, each time beside those that wait, and returns the first page that comes,
// with how long that one took.
func firstPage(ctx context.Context, get func(context.Context) (facts, error)) (time.Duration, facts, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	type page struct {
		took time.Duration
		f    facts
	}
	pages := make(chan page, 1)
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	for {
		all.Go(func() {
			began := time.Now()
			if f, err := get(ctx); err == nil {
				select {
				case pages <- page{time.Since(began).Round(time.Millisecond), f}:
				default:
				}
			}
		})
		select {
		case p := <-pages:
			return p.took, p.f, nil
		case <-ctx.Done():
			return 0, facts{}, errors.New("nobody served a new connection within a minute")
		case <-time.After(100 * time.Millisecond):
		}
	}
}
