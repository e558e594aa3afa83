package path

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// TestHellos: the path takes the hello of every client, however it is cut.
func TestHellos(t *testing.T) {
	s := world(t)
	t.Run("openssl", func(t *testing.T) {
		for _, version := range []string{"-tls1_2", "-tls1_3"} {
			out, err := s.Client.Sh(t.Context(), fmt.Sprintf(
				`printf 'GET /status?code=204 HTTP/1.1\r\nHost: %[1]s\r\nConnection: close\r\n\r\n' | timeout 20 openssl s_client -quiet -verify_return_error %[2]s -servername %[1]s -connect %[1]s:443`, lab.Site, version))
			if !strings.Contains(out, "HTTP/1.1 204") {
				t.Errorf("%s: %v %s", version, err, out)
			}
		}
	})
	t.Run("curl", func(t *testing.T) {
		for _, opt := range []string{"--http1.1", "--http2", "--tls-max 1.2", "-6"} {
			out, err := s.Client.Sh(t.Context(),
				fmt.Sprintf("curl -sS -m 20 -o /dev/null -w '%%{http_code}' %s 'https://%s/status?code=204'",
					opt, lab.Site))
			if err != nil || out != "204" {
				t.Errorf("curl %s: %q %v", opt, out, err)
			}
		}
	})
	t.Run("browser", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		dom, err := s.Browse(ctx, "https://"+lab.Site+"/", "")
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(dom, "203.0.113.7") && !strings.Contains(dom, "2001:db8:c::7") {
			t.Errorf("the page does not have the browser's address:\n%s", dom)
		}
	})
	for _, c := range []struct {
		name string
		wrap func(net.Conn) net.Conn
		conf func(*tls.Config)
	}{
		{name: "go"},
		{name: "byte by byte", wrap: func(c net.Conn) net.Conn { return &cutter{Conn: c} }},
		{name: "one byte a record",
			wrap: func(c net.Conn) net.Conn { return &cutter{Conn: c, records: true} }},
		{name: "16 KiB",
			conf: func(c *tls.Config) { c.NextProtos = append(c.NextProtos, longProtos(16<<10)...) }},
		{name: "16 KiB byte by byte",
			conf: func(c *tls.Config) { c.NextProtos = append(c.NextProtos, longProtos(16<<10)...) },
			wrap: func(c net.Conn) net.Conn { return &cutter{Conn: c} }},
		{name: "TLS 1.2", conf: func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			raw, err := s.Client.Dial(t.Context(), "tcp4", lab.Site+":443")
			if err != nil {
				t.Fatal(err)
			}
			defer raw.Close()
			raw.SetDeadline(time.Now().Add(patience))
			if c.wrap != nil {
				raw = c.wrap(raw)
			}
			conf := s.trust()
			conf.NextProtos = []string{"http/1.1"}
			if c.conf != nil {
				c.conf(conf)
			}
			conn := tls.Client(raw, conf)
			fmt.Fprintf(conn, "GET /status?code=204 HTTP/1.1\r\nHost: %s\r\n\r\n", lab.Site)
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil || res.StatusCode != 204 {
				t.Errorf("%v %v", res, err)
			}
		})
	}
	t.Run("a name nobody serves", func(t *testing.T) {
		raw, err := s.Client.Dial(t.Context(), "tcp4", lab.Site+":443")
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close()
		raw.SetDeadline(time.Now().Add(patience))
		conf := s.trust()
		conf.ServerName = "nobody.example"
		if err := tls.Client(raw, conf).Handshake(); err == nil ||
			!strings.Contains(err.Error(), "unrecognized name") {
			t.Errorf("got %v: want the alert unrecognized_name", err)
		}
	})
}

// cutter writes the first record, which carries the hello, in pieces of one byte: as TCP segments, or as TLS
// records.
type cutter struct {
	net.Conn
	records bool
	done    bool
}

func (c *cutter) Write(b []byte) (int, error) {
	if c.done {
		return c.Conn.Write(b)
	}
	c.done = true
	if c.records {
		var cut bytes.Buffer
		for _, x := range b[5:] {
			cut.Write([]byte{b[0], b[1], b[2], 0, 1, x})
		}
		_, err := c.Conn.Write(cut.Bytes())
		return len(b), err
	}
	c.Conn.(*net.TCPConn).SetNoDelay(true)
	for i := range b {
		if _, err := c.Conn.Write(b[i : i+1]); err != nil {
			return i, err
		}
		if i%64 == 0 {
			time.Sleep(time.Millisecond)
		}
	}
	return len(b), nil
}

// longProtos are ALPN names that make a hello n bytes longer.
func longProtos(n int) (protos []string) {
	for i := 0; n > 0; i++ {
		p := fmt.Sprintf("%04d%s", i, strings.Repeat("x", 200))
		protos = append(protos, p)
		n -= len(p) + 1
	}
	return protos
}

func drain(c net.Conn) {
	io.Copy(io.Discard, c)
	c.Close()
}

func directTo(s *story, from *lab.Host, addr string) *http.Transport {
	return &http.Transport{TLSClientConfig: s.trust(), DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return from.Dial(ctx, "tcp", addr)
	}}
}

func addrPort(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func contains(s string, parts ...string) bool {
	return !slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(s, p) })
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}
