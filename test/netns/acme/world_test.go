package acme

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
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
	"github.com/tailsplice/tailsplice/userspace/acme/acmetest"
)

// Where the authority is: in the cloud, an ordinary host of the internet. Its DNS server says that every name
// is at the anycast address.
const (
	authorityIP   = "198.51.100.82"
	authorityPort = 14000
	dnsAddr       = "127.0.0.1:8053"
)

// storage is a file system of home's own, so that it can be full or read-only.
const storage = "/run/acme"

// site is the world that the tests share.
type site struct {
	*lab.World
	edgeA, edgeB, home *lab.Daemon
	programs           acmetest.Programs
	pebble             *lab.Process
	roots              *x509.CertPool
}

var shared struct {
	once sync.Once
	site *site
	err  error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if s := shared.site; s != nil {
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

// The edges know nothing of certificates. Edge A passes port 80 on as bytes, edge B as requests: both must
// do.
const (
	edgeConfig = `listeners:
  - name: web
    listen: [":443"]
    mode: sni
    default: { forward: tailnet://home:443, send_proxy: v2 }
  - name: plain
    listen: [":80"]
    mode: %s
    default: { forward: tailnet://home:80%s }
limits: { connections_per_source: 4096, requests_per_source: 4096 }
`
	homeConfig = `listeners:
  - name: web
    listen: ["tailnet:443"]
    mode: https
    accept_proxy: { from: ["tag:edge"] }
    certificates:
%s    default: { forward: 127.0.0.1:3000 }
  - name: plain
    listen: ["tailnet:80"]
    mode: http
    accept_proxy: { from: ["tag:edge"] }
    default: { forward: 127.0.0.1:3000 }
limits: { connections_per_source: 4096, requests_per_source: 4096 }
`
)

// certificates is home's configuration with these names for each challenge.
func certificates(byChallenge ...[]string) string {
	var b strings.Builder
	for _, c := range byChallenge {
		fmt.Fprintf(&b, "      - acme: { names: [%s], challenges: [%s], email: me@vsq.cz, directory: \"https://%s:%d/dir\", ca: ca.pem, storage: %s }\n",
			strings.Join(c[1:], ", "), c[0], authorityIP, authorityPort, storage)
	}
	return fmt.Sprintf(homeConfig, b.String())
}

func world(t *testing.T) *site {
	t.Helper()
	o := lab.Options{NoDocker: true}
	lab.Require(t, o)
	shared.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
		defer cancel()
		shared.site, shared.err = begin(ctx, o)
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.site
}

func begin(ctx context.Context, o lab.Options) (_ *site, err error) {
	o.Progress = func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
	programs, err := acmetest.Build(ctx, o.Progress)
	if err != nil {
		return nil, err
	}
	w, err := lab.New(ctx, o)
	if err != nil {
		return nil, err
	}
	s := &site{World: w, programs: programs}
	defer func() {
		if err != nil {
			fmt.Fprintln(os.Stderr, w.Logs(40))
			w.Close()
		}
	}()
	bin, err := lab.BuildTailsplice(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.startAuthority(time.Hour); err != nil {
		return nil, err
	}
	if _, err := w.Home.Sh(ctx,
		"mkdir -m 700 "+storage+" && mount -t tmpfs -o size=512k,mode=700 tmpfs "+storage); err != nil {
		return nil, err
	}
	ln, err := w.Home.Listen("tcp", "127.0.0.1:3000")
	if err != nil {
		return nil, err
	}
	go http.Serve(ln, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(rw, "%s for %s\n", r.Host, r.Header.Get("X-Forwarded-For"))
	}))
	if s.edgeA, err = w.EdgeA.StartTailsplice(ctx, bin,
		fmt.Sprintf(edgeConfig, "tcp", ", send_proxy: v2")); err != nil {
		return nil, err
	}
	if s.edgeB, err = w.EdgeB.StartTailsplice(ctx, bin, fmt.Sprintf(edgeConfig, "http", "")); err != nil {
		return nil, err
	}
	s.home, err = w.Home.StartTailsplice(ctx, bin, certificates([]string{"http-01", "first.vsq.cz"}))
	return s, err
}

// startAuthority starts pebble in the cloud; certificates live as long as validity says.
func (s *site) startAuthority(validity time.Duration) error {
	dir := filepath.Join(s.Cloud.Dir, "pebble")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	c := acmetest.Config{Host: authorityIP, Port: authorityPort, HTTPPort: 80, TLSPort: 443, DNS: dnsAddr,
		Validity: validity}
	args, root, err := c.Write(dir)
	if err != nil {
		return err
	}
	pem, err := os.ReadFile(root)
	if err != nil {
		return err
	}
	if err := s.Home.WriteFile(filepath.Dir(lab.ConfigFile)+"/ca.pem", pem, 0o644); err != nil {
		return err
	}
	if s.pebble == nil {
		if _, err := s.Cloud.StartProcess("dns", append([]string{s.programs.DNS},
			acmetest.DNSArgs(dnsAddr, "127.0.0.1:8055", lab.Anycast4.String(), lab.Anycast6.String())...),
			nil); err != nil {
			return err
		}
	}
	s.pebble, err = s.Cloud.StartProcess("pebble", append([]string{s.programs.Pebble}, args...),
		func(cmd *lab.Cmd) { cmd.Env = append(cmd.Env, acmetest.Env...) })
	if err != nil {
		return err
	}
	client := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return s.Cloud.Dial(ctx, "tcp", addr)
		}}}
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		res, err := client.Get(c.Roots())
		if err == nil {
			b, _ := io.ReadAll(res.Body)
			res.Body.Close()
			s.roots = x509.NewCertPool()
			if s.roots.AppendCertsFromPEM(b) {
				return nil
			}
			err = fmt.Errorf("no root in %q", b)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("pebble does not answer: %w\n%s", err, s.pebble.Output())
		}
	}
}

// restartAuthority has the authority issue certificates of another validity from another root.
func (s *site) restartAuthority(t *testing.T, validity time.Duration) {
	t.Helper()
	s.pebble.Kill()
	if err := s.startAuthority(validity); err != nil {
		t.Fatal(err)
	}
}

// issued counts what the authority has issued in all its lives.
func (s *site) issued() int { return strings.Count(s.pebble.Output(), "Issued certificate serial") }

// page requests https://NAME/ from the client, by a connection of its own, and returns the certificate.
func (s *site) page(ctx context.Context, name string, roots *x509.CertPool) (*x509.Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		TLSClientConfig: &tls.Config{RootCAs: roots},
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			_, port, _ := net.SplitHostPort(addr)
			return s.Client.Dial(ctx, "tcp4", net.JoinHostPort(lab.Anycast4.String(), port))
		}}}
	req, err := http.NewRequestWithContext(ctx, "GET", "https://"+name+"/", nil)
	if err != nil {
		return nil, err
	}
	res, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return nil, err
	}
	if want := name + " for 203.0.113.7\n"; res.StatusCode != 200 || string(b) != want {
		return nil, fmt.Errorf("%s: %q: want %q", res.Status, b, want)
	}
	return res.TLS.PeerCertificates[0], nil
}

// configure reloads home with another configuration.
func (s *site) configure(t *testing.T, config string) {
	t.Helper()
	if err := s.home.SetConfig(config); err != nil {
		t.Fatal(err)
	}
	if _, err := s.home.CLI(t.Context(), "reload"); err != nil {
		t.Fatal(err)
	}
}

// status is what `tailsplice status` says of a name.
type status struct {
	Name, State, Problem string
	NotAfter             time.Time `json:"not_after"`
}

func (s *site) status(t *testing.T, name string) status {
	t.Helper()
	out, err := s.home.CLI(t.Context(), "status", "--json")
	if err != nil {
		t.Fatal(err)
	}
	var all struct{ Listeners []struct{ ACME []status } }
	if err := json.Unmarshal(out, &all); err != nil {
		t.Fatal(err)
	}
	for _, l := range all.Listeners {
		for _, st := range l.ACME {
			if st.Name == name {
				return st
			}
		}
	}
	t.Fatalf("status does not know %s: %s", name, out)
	return status{}
}

// patience is for what comes sooner or later, on a machine that is busy too.
const patience = 2 * time.Minute

func eventually(t *testing.T, what string, ok func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if err = ok(); err == nil {
			return
		}
	}
	t.Fatalf("%s: not within %v: %v", what, patience, err)
}
