package server

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/freeaddr"
	"github.com/tailsplice/tailsplice/test/logs"
	"github.com/tailsplice/tailsplice/userspace/acme"
	"github.com/tailsplice/tailsplice/userspace/acme/acmetest"
)

// TestACME: an https listener whose names have no certificate yet starts at
// once, answers the authority on the listeners that there are, serves, and goes
// on over a reload without another order.
func TestACME(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	programs, err := acmetest.Build(ctx, t.Logf)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skipf("pebble can't be built: %v", err)
	}
	host := "127.0.0.1"
	web, plain, dns, manage, dir := freeAddr(t), freeAddr(t), freeAddr(t), freeAddr(t), t.TempDir()
	port := func(addr string) int { return int(netip.MustParseAddrPort(addr).Port()) }
	c := acmetest.Config{Host: host, Port: freeaddr.Ports(t, host, 2), HTTPPort: port(plain), TLSPort: port(web), DNS: dns, Validity: time.Hour}
	args, root, err := c.Write(dir)
	if err != nil {
		t.Fatal(err)
	}
	log := &logs.Log{}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(log)
		}
	})
	for _, argv := range [][]string{append([]string{programs.DNS}, acmetest.DNSArgs(dns, manage, "127.0.0.1", "")...), append([]string{programs.Pebble}, args...)} {
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.Env = append(os.Environ(), acmetest.Env...)
		cmd.Stdout, cmd.Stderr = log, log
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	}
	insecure := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	pool := x509.NewCertPool()
	eventually(t, "pebble answers", func() bool {
		res, err := insecure.Get(c.Roots())
		if err != nil {
			return false
		}
		defer res.Body.Close()
		pem, _ := io.ReadAll(res.Body)
		return pool.AppendCertsFromPEM(pem)
	})
	if t.Failed() {
		t.FailNow()
	}

	up := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Host, r.URL.Path) })}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go up.Serve(ln)
	t.Cleanup(func() { up.Close() })
	config := func(names string) string {
		section := func(challenge, name string) string {
			return fmt.Sprintf("      - acme: { names: [%s], challenges: [%s], directory: %q, ca: %s, storage: %s }\n",
				name, challenge, c.Directory(), root, filepath.Join(dir, "storage"))
		}
		return fmt.Sprintf("listeners:\n  - { name: plain, listen: [%q], mode: http, default: { forward: %q } }\n"+
			"  - name: web\n    listen: [%q]\n    mode: https\n    default: { forward: %q }\n    certificates:\n%s%s",
			plain, ln.Addr(), web, ln.Addr(), section("http-01", "a.test"), section("tls-alpn-01", names))
	}
	d := start(t, config("b.test"))
	get := func(name string) error {
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: pool},
			DialContext: func(context.Context, string, string) (net.Conn, error) { return net.Dial("tcp", web) }}}
		res, err := client.Get("https://" + name + "/x")
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if b, _ := io.ReadAll(res.Body); string(b) != name+"/x" {
			return fmt.Errorf("%s: %q", res.Status, b)
		}
		return nil
	}
	for _, name := range []string{"a.test", "b.test"} {
		eventually(t, "a page of "+name, func() bool { return get(name) == nil })
	}
	if err := d.Reload(parse(t, config("b.test, c.test"))); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a.test", "b.test"} {
		if err := get(name); err != nil {
			t.Errorf("after the reload: %v", err)
		}
	}
	eventually(t, "a page of c.test", func() bool { return get("c.test") == nil })
	if n := strings.Count(log.String(), "Issued certificate serial"); n != 3 {
		t.Errorf("%d certificates were issued: want 3", n)
	}
	// What only looks like an authority's question goes where the routes say.
	res, err := http.Get("http://" + plain + acme.ChallengePath + "nobodys")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if b, _ := io.ReadAll(res.Body); !strings.HasSuffix(string(b), acme.ChallengePath+"nobodys") {
		t.Errorf("a token of nobody's: %s %q: want the upstream's answer", res.Status, b)
	}
	for _, l := range d.Status().Listeners {
		if want := map[string]int{"web": 3}[l.Name]; len(l.ACME) != want {
			t.Errorf("status of %s has %+v: want %d names", l.Name, l.ACME, want)
		}
		for _, a := range l.ACME {
			if a.State != acme.StateValid {
				t.Errorf("%+v", a)
			}
		}
	}
}

// oneSession gives a client the same session for whatever name.
type oneSession struct{ tls.ClientSessionCache }

func (o oneSession) Get(string) (*tls.ClientSessionState, bool) { return o.ClientSessionCache.Get("x") }
func (o oneSession) Put(_ string, s *tls.ClientSessionState)    { o.ClientSessionCache.Put("x", s) }

// TestTickets resumes sessions, and none at a name that asks for a client's
// certificate: the session would bring the answer of another handshake.
func TestTickets(t *testing.T) {
	cert, pool := certificate(t, "open.test", "closed.test")
	certFile, keyFile := writePair(t, cert)
	own, _ := certificate(t, "client")
	ca := filepath.Join(t.TempDir(), "ca.pem")
	writeCA(t, ca, own)
	addr := freeAddr(t)
	start(t, fmt.Sprintf(`
listeners:
  - listen: [%q]
    mode: https
    certificates: [ { files: { cert: %q, key: %q } } ]
    routes:
      - { host: open.test, redirect: "https://new.test" }
      - { host: closed.test, redirect: "https://new.test", client_certificates: { ca: %q } }
`, addr, certFile, keyFile, ca))
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		cache := oneSession{tls.NewLRUClientSessionCache(1)}
		for i, c := range []struct {
			name    string
			resumed bool
			status  int
		}{{"open.test", false, 308}, {"open.test", true, 308}, {"closed.test", false, 308}, {"closed.test", false, 308}} {
			conn, err := tls.Dial("tcp", addr, &tls.Config{RootCAs: pool, ServerName: c.name, MaxVersion: version, ClientSessionCache: cache, Certificates: []tls.Certificate{own}})
			if err != nil {
				t.Fatal(err)
			}
			conn.SetDeadline(time.Now().Add(patience))
			fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", c.name)
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			conn.Close()
			if got := conn.ConnectionState().DidResume; got != c.resumed || res.StatusCode != c.status {
				t.Errorf("%s, handshake %d with %s: resumed %t, %d", tls.VersionName(version), i+1, c.name, got, res.StatusCode)
			}
		}
	}
}
