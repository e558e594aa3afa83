package path

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// TestPage: the page comes through either edge, over IPv4 and IPv6; the container sees the browser's address;
// all hops log the flow under one id.
func TestPage(t *testing.T) {
	s := world(t)
	for _, c := range []struct {
		edge   *lab.Daemon
		family string
		client string
	}{
		{s.edgeA, "tcp4", "203.0.113.7"}, {s.edgeA, "tcp6", "2001:db8:c::7"},
		{s.edgeB, "tcp4", "203.0.113.7"}, {s.edgeB, "tcp6", "2001:db8:c::7"},
	} {
		t.Run(c.edge.Host.Name+" "+c.family, func(t *testing.T) {
			s.prefer(t, c.edge.Host)
			f, err := s.page(t.Context(), c.family)
			if err != nil {
				t.Fatal(err)
			}
			if f.Client != c.client || f.Proto != "https" || f.Container != "blog" ||
				!strings.Contains(f.Cloud, "Hello from the cloud") {
				t.Errorf("the container saw %+v: want the client %s, https, and an answer of the cloud", f,
					c.client)
			}
			for _, d := range []*lab.Daemon{c.edge, s.home, s.laptop} {
				if l := flowOf(t, d, f.Path); l["name"] != lab.Site || hostOf(l["client"]) != c.client {
					t.Errorf("%s logs %v", d.Host.Name, l)
				}
			}
		})
	}
}

// TestFailover: an edge that is cut off, seen or unseen, is replaced by the other.
func TestFailover(t *testing.T) {
	s := world(t)
	for _, silent := range []bool{false, true} {
		t.Run(map[bool]string{false: "link down", true: "packets vanish"}[silent], func(t *testing.T) {
			s.prefer(t, s.EdgeA)
			if _, err := s.page(t.Context(), "tcp4"); err != nil {
				t.Fatal(err)
			}
			cut := time.Now()
			if err := s.EdgeA.Cut(silent); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := s.EdgeA.Restore(); err != nil {
					t.Error(err)
				}
			})
			for {
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				f, err := s.page(ctx, "tcp4")
				cancel()
				if err == nil {
					t.Logf("edge B answered after %v", time.Since(cut))
					flowOf(t, s.edgeB, f.Path)
					return
				}
				if time.Since(cut) > patience {
					t.Fatalf("nobody answers %v after the cut: %v", patience, err)
				}
			}
		})
	}
}

// TestHomeRestarts: after a restart of home's daemon, stopped or killed, the next request works.
func TestHomeRestarts(t *testing.T) {
	s := world(t)
	for _, kill := range []bool{false, true} {
		if kill {
			s.home.Kill()
			<-s.home.Done()
			if err := s.home.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
		} else if err := s.home.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := s.page(t.Context(), "tcp4"); err != nil {
			t.Errorf("the first request after the restart (killed: %v): %v", kill, err)
		}
	}
}

// TestRoam: during a download of 256 MiB by the whole path the laptop changes its network.
func TestRoam(t *testing.T) {
	s := world(t)
	const size = 256 << 20
	first := s.Laptop.Uplink()
	t.Cleanup(func() {
		if err := s.Laptop.Roam(first); err != nil {
			t.Error(err)
		}
		eventually(t, "the path after roaming back",
			func() error { _, err := s.page(context.Background(), "tcp4"); return err })
	})
	c := s.browser(s.Client, "tcp4", false)
	c.Timeout = 10 * patience
	res, err := c.Get(fmt.Sprintf("https://%s/bytes?n=%d&seed=7", lab.Site, size))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	sum := sha256.New()
	buf := make([]byte, 256<<10)
	total, roamed := 0, false
	var longest time.Duration
	last := time.Now()
	for {
		n, err := res.Body.Read(buf)
		sum.Write(buf[:n])
		total += n
		longest, last = max(longest, time.Since(last)), time.Now()
		if !roamed && total > size/4 {
			roamed = true
			if err := s.Laptop.Roam(map[string]string{"wifi": "hotspot",
				"hotspot": "wifi"}[first]); err != nil {
				t.Fatal(err)
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatalf("after %d bytes: %v", total, err)
		}
	}
	t.Logf("the longest pause was %v", longest)
	if got, want := hex.EncodeToString(sum.Sum(nil)), res.Trailer.Get("X-Sha256"); total != size ||
		got != want || want == "" {
		t.Errorf("%d bytes with sha256 %s: want %d with %s", total, got, size, want)
	}
}

// TestWebSockets: 200 echoes at once by the whole path.
func TestWebSockets(t *testing.T) {
	s := world(t)
	const parallel, rounds = 200, 5
	c := s.browser(s.Client, "tcp4", false)
	c.Timeout = 0
	c.Transport.(*http.Transport).ForceAttemptHTTP2 = false
	var wg sync.WaitGroup
	for i := range parallel {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 5*patience)
			defer cancel()
			ws, _, err := websocket.Dial(ctx, "wss://"+lab.Site+"/ws", &websocket.DialOptions{HTTPClient: c})
			if err != nil {
				t.Errorf("websocket %d: %v", i, err)
				return
			}
			defer ws.CloseNow()
			ws.SetReadLimit(1 << 20)
			for r := range rounds {
				msg := bytes.Repeat([]byte(fmt.Sprintf("%d/%d ", i, r)), 1+i*37)
				if err := ws.Write(ctx, websocket.MessageBinary, msg); err != nil {
					t.Errorf("websocket %d: %v", i, err)
					return
				}
				_, got, err := ws.Read(ctx)
				if err != nil || !bytes.Equal(got, msg) {
					t.Errorf("websocket %d: %d of %d bytes came back, %v", i, len(got), len(msg), err)
					return
				}
			}
			ws.Close(websocket.StatusNormalClosure, "")
		})
	}
	wg.Wait()
}

// TestReload: with a connection open, a broken configuration changes nothing and says why; a good one takes
// effect for new requests on it.
func TestReload(t *testing.T) {
	s := world(t)
	c := s.browser(s.Client, "tcp4", true)
	defer c.CloseIdleConnections()
	s.configure(t, s.laptop, laptopConfig)
	get := func() int {
		t.Helper()
		res, err := c.Get("https://" + lab.Site + "/status?code=200")
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, res.Body)
		res.Body.Close()
		return res.StatusCode
	}
	if code := get(); code != 200 {
		t.Fatalf("before: %d", code)
	}
	if err := s.laptop.SetConfig(laptopConfig + "nonsense: 1\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.laptop.CLI(t.Context(), "reload"); err == nil ||
		!strings.Contains(err.Error(), lab.ConfigFile+":") || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("reload of a broken configuration: %v", err)
	}
	if code := get(); code != 200 {
		t.Errorf("after the broken configuration: %d", code)
	}
	dead := strings.ReplaceAll(laptopConfig, "docker://blog:8080", "docker://blgo:8080")
	if err := s.laptop.SetConfig(dead); err != nil {
		t.Fatal(err)
	}
	if err := s.laptop.Hangup(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the new route", func() error {
		if code := get(); code != 503 {
			return fmt.Errorf("status %d: want 503, there is no such container", code)
		}
		return nil
	})
}
