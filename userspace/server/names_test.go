package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// sClient makes a handshake with OpenSSL, which sends any server name as it is, sends a request, and returns what comes
// back, messages about failed handshakes included.
func sClient(t *testing.T, addr, name, version string) string {
	t.Helper()
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("no openssl")
		}
		t.Skip("this machine lacks openssl")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, openssl, "s_client", "-connect", addr, "-servername", name, version, "-quiet", "-ign_eof")
	cmd.Stdin = strings.NewReader("GET / HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n")
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		t.Fatalf("openssl: %v, %q", err, out)
	}
	return string(out)
}

// oddNames gives f each version of TLS and each family.
func oddNames(t *testing.T, addr string, f func(t *testing.T, addr, version string)) {
	_, port, _ := net.SplitHostPort(addr)
	for _, version := range []string{"-tls1_2", "-tls1_3"} {
		for _, host := range []string{"127.0.0.1", "::1"} {
			t.Run(version[1:]+" "+host, func(t *testing.T) { f(t, net.JoinHostPort(host, port), version) })
		}
	}
}

// TestOddServerNames sends an edge what clients put in the place of a name: it goes where the name would, or to the
// default, and round no rule.
func TestOddServerNames(t *testing.T) {
	cert, _ := certificate(t, "a.test")
	addr := freeAddr(t)
	_, port, _ := net.SplitHostPort(addr)
	d := start(t, fmt.Sprintf(`
listeners:
  - name: web
    listen: [":%s"]
    mode: sni
    routes:
      - { sni: a.test, forward: %q }
      - { sni: "*.guarded.test", reject: true }
    default: { forward: %q }
`, port, tlsBackend(t, "this is a", cert), tlsBackend(t, "this is default", cert)))
	oddNames(t, addr, func(t *testing.T, addr, version string) {
		for name, want := range map[string]string{
			"a.test":              "this is a\n",
			"A.test:443":          "this is a\n",
			"192.0.2.1":           "this is default\n",
			"192.0.2.1:443":       "this is default\n",
			"2001:db8::1":         "this is default\n",
			"[2001:db8::1]":       "this is default\n",
			"[2001:db8::1]:443":   "this is default\n",
			"-x.test":             "this is default\n",
			"x.y-.test":           "this is default\n",
			"other.test:8443":     "this is default\n",
			"x.guarded.test":      "alert number 112",
			"x.guarded.test:443":  "alert number 112",
			"x.guarded.test.:443": "alert number 112",
			"x-.guarded.test":     "alert number 112",
			"-.guarded.test":      "alert number 112",
			"x.guarded.test:80:8": "alert number 47",
			"x y.guarded.test":    "alert number 47",
		} {
			if got := sClient(t, addr, name, version); !strings.Contains(got, want) {
				t.Errorf("%s: got %q, want %q", name, got, want)
			}
		}
	})
	if n := d.refused("unrecognized_name"); n != 4*5 {
		t.Errorf("%d refused as unrecognized_name", n)
	}
}

// TestServerNameWithDot: a name with a dot at its end, which browsers send for https://a.test./, is the one without.
// The targets read no hello: Go's TLS takes no such name.
func TestServerNameWithDot(t *testing.T) {
	says := func(what string) string {
		return backend(t, func(c net.Conn) { defer c.Close(); io.WriteString(c, what); io.Copy(io.Discard, c) })
	}
	addr := freeAddr(t)
	start(t, fmt.Sprintf(`
listeners:
  - name: web
    listen: [%q]
    mode: sni
    routes:
      - { sni: a.test, forward: %q }
      - { sni: "*.w.test", forward: %q }
      - { sni: "*.guarded.test", reject: true }
    default: { forward: %q }
`, addr, says("this is a"), says("this is w"), says("this is default")))
	for name, want := range map[string]string{
		"a.test.": "this is a", "A.Test.": "this is a", "x.w.test.": "this is w", "b.test.": "this is default",
		"x.guarded.test.": "\x15\x03\x01\x00\x02\x02\x70",
	} {
		hello := bytes.Replace(helloFor(t, name[:len(name)-1]+"x"), []byte(name[:len(name)-1]+"x"), []byte(name), 1)
		c := dialTCP(t, addr)
		c.Write(hello)
		got := make([]byte, len(want))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v, want %q", name, got, err, want)
		}
		c.Close()
	}
}

// TestOddServerNamesHTTPS sends them to an https listener, which reads them the same way, refuses the one that crypto/tls
// can't be given, and says why.
func TestOddServerNamesHTTPS(t *testing.T) {
	cert, _ := certificate(t, "a.test", "*.w.test")
	certFile, keyFile := writePair(t, cert)
	addr := freeAddr(t)
	_, port, _ := net.SplitHostPort(addr)
	d := start(t, fmt.Sprintf(`
listeners:
  - name: web
    listen: [":%s"]
    mode: https
    certificates: [ { files: { cert: %q, key: %q } } ]
    routes: [ { host: [a.test, "*.w.test"], forward: %q } ]
`, port, certFile, keyFile, httpBackend(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "this is a") })))
	oddNames(t, addr, func(t *testing.T, addr, version string) {
		for name, want := range map[string]string{
			"a.test":        "this is a",
			"A.test:443":    "this is a",
			"192.0.2.1":     "this is a",
			"192.0.2.1:443": "this is a",
			"[::1]:443":     "this is a",
			"::1":           "this is a",
			"x-.w.test":     "this is a",
			"a.test.":       "alert number 112",
			"nobody.test.":  "alert number 112",
			"nobody.test":   "alert number 112",
			"b.test:443":    "alert number 112",
		} {
			if got := sClient(t, addr, name, version); !strings.Contains(got, want) {
				t.Errorf("%s: got %q, want %q", name, got, want)
			}
		}
	})
	for _, want := range []string{"the name with a dot at its end", `no certificate here is for`} {
		if !strings.Contains(d.log.String(), want) {
			t.Errorf("the log does not say %q", want)
		}
	}
	if n := d.refused("unrecognized_name"); n != 4*2 {
		t.Errorf("%d refused as unrecognized_name", n)
	}
	if strings.Contains(d.log.String(), "no certificates configured") {
		t.Error("the log says that there are no certificates")
	}

	// A name with a port is the name, also where a browser's connection for another one would not do.
	var h2 http.Protocols
	h2.SetHTTP2(true)
	tr := &http.Transport{Protocols: &h2, TLSClientConfig: &tls.Config{InsecureSkipVerify: true, ServerName: "x.w.test:443"},
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		}}
	defer tr.CloseIdleConnections()
	res, err := (&http.Client{Transport: tr, Timeout: time.Minute}).Get("https://x.w.test/")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if body, _ := io.ReadAll(res.Body); res.StatusCode != 200 || res.ProtoMajor != 2 {
		t.Errorf("by HTTP/2: %s %q", res.Status, body)
	}
}
