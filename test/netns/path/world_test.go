package path

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// story is the world that the tests share, with the daemons of the story on their hosts. Each test leaves it
// as it found it: edge A preferred, everything connected, the story's configurations in force.
type story struct {
	*lab.World
	edgeA, edgeB, home, laptop *lab.Daemon
}

var shared struct {
	once  sync.Once
	story *story
	err   error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if s := shared.story; s != nil {
		if code != 0 {
			fmt.Fprintln(os.Stderr, s.Logs(15))
		}
		if err := s.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "take the world down:", err)
			code = 1
		}
	}
	os.Exit(code)
}

// The configurations are the lab's, with limits that let one client make all the connections of a test, and
// with a second listener each that passes TCP untouched as far as the laptop.
const (
	limits     = "limits: { connections_per_source: 4096, requests_per_source: 4096 }\n"
	edgeConfig = lab.EdgeConfig + `  - name: raw
    listen: [":9000"]
    mode: tcp
    default: { forward: tailnet://home:9000, send_proxy: v2 }
` + limits
	homeConfig = lab.HomeConfig + `  - name: raw
    listen: ["tailnet:9000"]
    mode: tcp
    accept_proxy: { from: ["tag:edge"] }
    default: { forward: tailnet://laptop:9000, send_proxy: v2 }
` + limits
	laptopConfig = lab.LaptopConfig + `  - name: raw
    listen: ["tailnet:9000"]
    mode: tcp
    accept_proxy: { from: ["tag:home"] }
    default: { forward: "127.0.0.1:9000" }
` + limits
)

// world gives the shared world, which the first test makes.
func world(t *testing.T) *story {
	t.Helper()
	lab.Require(t, lab.Options{Friend: true}, "curl", "openssl", "chromium", "certutil")
	shared.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
		defer cancel()
		shared.story, shared.err = begin(ctx)
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.story
}

func begin(ctx context.Context) (*story, error) {
	progress := func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
	w, err := lab.New(ctx, lab.Options{Friend: true, Progress: progress})
	if err != nil {
		return nil, err
	}
	s := &story{World: w}
	bin, err := lab.BuildTailsplice(ctx)
	if err == nil {
		err = w.Home.InstallCertificate()
	}
	start := func(h *lab.Host, config string) (d *lab.Daemon) {
		if err == nil {
			d, err = h.StartTailsplice(ctx, bin, config)
		}
		return d
	}
	if err == nil { // with pins of its own, whoever else is on this machine
		_, err = w.EdgeA.Sh(ctx, "mount -t bpf bpf /sys/fs/bpf")
	}
	s.edgeA = start(w.EdgeA, strings.Replace(edgeConfig, limits, sockmapConfig(w.Home)+limits, 1))
	s.edgeB = start(w.EdgeB, edgeConfig)
	s.home, s.laptop = start(w.Home, homeConfig), start(w.Laptop, laptopConfig)
	if err == nil {
		err = s.waitServing(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, w.Logs(40))
		w.Close()
		return nil, err
	}
	return s, nil
}

// waitServing waits until a page comes by the whole path.
func (s *story) waitServing(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		_, err := s.page(ctx, "tcp4")
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the path does not serve: %w", err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// dialer dials the site from a host: whatever name is asked for, the connection goes to the anycast address.
func (s *story) dialer(from *lab.Host, network string) func(ctx context.Context, _, _ string) (net.Conn, error) {
	return func(ctx context.Context, _, addr string) (net.Conn, error) {
		_, port, _ := net.SplitHostPort(addr)
		return from.Dial(ctx, network, net.JoinHostPort(lab.Site, port))
	}
}

// trust is a TLS configuration of who trusts the lab's CA.
func (s *story) trust() *tls.Config {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(s.CA.PEM)
	return &tls.Config{RootCAs: pool, ServerName: lab.Site}
}

// browser is an HTTP client on a host. It makes a new connection for each request unless keep.
func (s *story) browser(from *lab.Host, network string, keep bool) *http.Client {
	return &http.Client{Timeout: patience, Transport: &http.Transport{DialContext: s.dialer(from, network),
		TLSClientConfig:   s.trust(),
		DisableKeepAlives: !keep, ForceAttemptHTTP2: true}}
}

// facts are what the container saw.
type facts struct {
	Client    string `json:"client"`
	Proto     string `json:"proto"`
	Path      string `json:"path_id"`
	Container string `json:"container"`
	Cloud     string `json:"cloud"`
}

// page requests the site once, on a connection of its own.
func (s *story) page(ctx context.Context, network string) (facts, error) {
	req, err := http.NewRequestWithContext(ctx, "GET", "https://"+lab.Site+"/", nil)
	if err != nil {
		return facts{}, err
	}
	req.Header.Set("Accept", "application/json")
	c := s.browser(s.Client, network, false)
	defer c.CloseIdleConnections()
	res, err := c.Do(req)
	if err != nil {
		return facts{}, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return facts{}, err
	}
	var f facts
	if err := json.Unmarshal(body, &f); err != nil || res.StatusCode != 200 {
		return f, fmt.Errorf("%s: %s", res.Status, body)
	}
	return f, nil
}

// daemonStatus is what the tests need of `tailsplice status --json`.
type daemonStatus struct {
	Flows     int
	Accepted  map[string]int64
	Refused   map[string]int64
	Listeners []struct{ Bound []string }
}

func status(t *testing.T, d *lab.Daemon) (s daemonStatus) {
	t.Helper()
	out, err := d.CLI(t.Context(), "status", "--json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(out, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// prefer sends the client's new connections to one edge, until the test ends.
func (s *story) prefer(t *testing.T, edge *lab.Host) {
	t.Helper()
	if err := s.Prefer(t.Context(), edge); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Prefer(context.Background(), s.EdgeA); err != nil {
			t.Error(err)
		}
	})
}

// configure reloads a daemon with another configuration, until the test ends.
func (s *story) configure(t *testing.T, d *lab.Daemon, config string) {
	t.Helper()
	old, err := d.Host.ReadFile(lab.ConfigFile)
	if err != nil {
		t.Fatal(err)
	}
	reload := func(config string) {
		t.Helper()
		if err := d.SetConfig(config); err != nil {
			t.Error(err)
		}
		if _, err := d.CLI(context.Background(), "reload"); err != nil {
			t.Error(err)
		}
	}
	reload(config)
	t.Cleanup(func() { reload(string(old)) })
}

// flowOf waits for the line of the flow with this path id in a daemon's log.
func flowOf(t *testing.T, d *lab.Daemon, id string) lab.LogLine {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	l, err := d.WaitLog(ctx, func(l lab.LogLine) bool { return l["msg"] == "flow ended" && l["id"] == id })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// patience is for what comes sooner or later, on a machine that is busy too.
const patience = time.Minute

// eventually waits until ok.
func eventually(t *testing.T, what string, ok func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if err = ok(); err == nil {
			return
		}
	}
	t.Errorf("%s: not within %v: %v", what, patience, err)
}

func hostOf(addr any) string {
	s := fmt.Sprint(addr)
	if h, _, err := net.SplitHostPort(s); err == nil {
		return h
	}
	return strings.Trim(s, "[]")
}
