package path

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// visitor is a client that keeps its connection to the site.
type visitor struct {
	network string
	client  *http.Client
}

// asks requests a page. isKept says whether that went by the connection from before.
func (v *visitor) asks(ctx context.Context) (f facts, isKept bool, err error) {
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) { isKept = i.Reused }})
	req, err := http.NewRequestWithContext(ctx, "GET", "https://"+lab.Site+"/", nil)
	if err != nil {
		return f, false, err
	}
	req.Header.Set("Accept", "application/json")
	res, err := v.client.Do(req)
	if err != nil {
		return f, isKept, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != 200 {
		return f, isKept, fmt.Errorf("%s: %s, %v", res.Status, body, err)
	}
	return f, isKept, json.Unmarshal(body, &f)
}

// TestTwoEdges: edge A is taken out of service as docs/anycast.md says it. BGP moves, no connection is refused or
// cut, those that were open go on by edge A, and it ends with the last one. An edge whose daemon is killed is
// replaced by the other one.
func TestTwoEdges(t *testing.T) {
	s := world(t)
	lab.Require(t, lab.Options{}, "nft", "ping", "curl")
	s.announce(t)
	s.joinEdges(t)
	s.takesOver(t, s.edgeA)

	t.Run("drained", func(t *testing.T) {
		var kept []*visitor
		for i := range 20 {
			v := &visitor{network: []string{"tcp4", "tcp6"}[i%2]}
			v.client = s.browser(s.Client, v.network, true)
			defer v.client.CloseIdleConnections()
			if _, _, err := v.asks(t.Context()); err != nil {
				t.Fatal(err)
			}
			kept = append(kept, v)
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var clients sync.WaitGroup
		var served, failed int
		clients.Go(func() { // new ones come all the time
			for ctx.Err() == nil {
				if _, err := s.page(t.Context(), "tcp4"); err != nil {
					failed++
					t.Errorf("a new connection while BGP moves: %v", err)
				} else {
					served++
				}
			}
		})
		drained := make(chan error, 1)
		go func() {
			out, err := s.edgeA.CLI(context.Background(), "drain", "--all", "--end")
			if err == nil && !strings.HasSuffix(string(out), "the daemon has ended\n") {
				err = errors.New(string(out))
			}
			drained <- err
		}()
		s.routed(t, s.EdgeB)
		s.takesOver(t, s.edgeB)
		eventually(t, "edge A's sockets are closed", func() error {
			if n := status(t, s.edgeA).bound(); n > 0 {
				return fmt.Errorf("%d addresses are bound", n)
			}
			return nil
		})
		cancel()
		clients.Wait()
		t.Logf("%d new connections were served meanwhile, %d failed", served, failed)
		for _, v := range kept {
			if _, isKept, err := v.asks(t.Context()); err != nil || !isKept {
				t.Errorf("a connection from before, by %s: kept %t, %v", v.network, isKept, err)
			}
		}
		select {
		case err := <-drained:
			t.Fatalf("edge A has ended before its last flow: %v", err)
		default:
		}
		for _, v := range kept {
			v.client.CloseIdleConnections()
		}
		ctx, cancel = context.WithTimeout(t.Context(), patience)
		defer cancel()
		select {
		case err := <-drained:
			if err != nil {
				t.Error(err)
			}
		case <-ctx.Done():
			t.Fatal("edge A does not end with its last flow")
		}
		if err := s.edgeA.Wait(); err != nil {
			t.Errorf("edge A's daemon: %v", err)
		}
		if err := s.edgeA.Start(ctx); err != nil {
			t.Fatal(err)
		}
		s.routed(t, s.EdgeA)
		s.takesOver(t, s.edgeA)
	})
	t.Run("killed", func(t *testing.T) {
		killed := time.Now()
		if err := s.edgeA.Signal(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		_ = s.edgeA.Wait()
		s.takesOver(t, s.edgeB)
		served := time.Since(killed)
		t.Logf("edge B served %v after edge A was killed", served.Round(time.Millisecond))
		if served > takeover {
			t.Errorf("edge B served %v after edge A was killed, want %v at most", served, takeover)
		}
		if err := s.edgeA.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.routed(t, s.EdgeA)
		s.takesOver(t, s.edgeA)
	})
}

// routed waits until the router sends both families to an edge.
func (s *story) routed(t *testing.T, edge *lab.Host) {
	t.Helper()
	eventually(t, "BGP moves to "+edge.Name, func() error {
		if s.Route(lab.Anycast4) != edge || s.Route(lab.Anycast6) != edge {
			return errors.New("it does not")
		}
		return nil
	})
}

// takesOver waits until a page comes by d.
func (s *story) takesOver(t *testing.T, d *lab.Daemon) {
	t.Helper()
	eventually(t, "a page by "+d.Host.Name, func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		f, err := s.page(ctx, "tcp4")
		if err != nil {
			return err
		}
		return logged(d, f.Path)
	})
}

// joinEdges has each edge send packets of connections that it does not know to the other one.
func (s *story) joinEdges(t *testing.T) {
	t.Helper()
	script := string(documented(t, "/usr/local/bin/sibling"))
	swapped := strings.NewReplacer("here=198.51.100.2 there=198.51.100.18", "here=198.51.100.18 there=198.51.100.2", "me=1 other=2", "me=2 other=1")
	const file = "/etc/sibling"
	for i, e := range s.Edges() {
		text := script
		if i == 1 {
			text = swapped.Replace(script)
		}
		if err := e.WriteFile(file, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		p, err := e.StartProcess("sibling", []string{file}, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			p.Stop(time.Second)
			if _, err := e.Sh(context.Background(), "ip link del sibling; nft delete table ip sibling; nft delete table ip6 sibling"); err != nil {
				t.Error(err)
			}
		})
	}
	eventually(t, "the edges reach each other", func() error {
		for _, e := range s.Edges() {
			out, err := e.Sh(t.Context(), "nft list map ip sibling to && nft list map ip6 sibling to")
			if err != nil || strings.Count(out, "elements") != 2 {
				return fmt.Errorf("%v: %s", err, out)
			}
		}
		return nil
	})
}

// bound is how many addresses are.
func (s daemonStatus) bound() (n int) {
	for _, l := range s.Listeners {
		n += len(l.Bound)
	}
	return n
}
