package clients

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/tailsplice/tailsplice/test/freeaddr"
	"github.com/tailsplice/tailsplice/test/selfsigned"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
	"github.com/tailsplice/tailsplice/userspace/server"
)

const site = "example.vsq.cz"

// hop is a daemon that terminates TLS for site and sends everything on.
type hop struct {
	addr string
	tls  *tls.Config // of a client that trusts it
}

// start begins a hop whose default is the given action, such as `forward: 127.0.0.1:80`.
func start(t *testing.T, action string) hop {
	t.Helper()
	cert := selfsigned.Certificate(t, site)
	certPEM, keyPEM := selfsigned.PEM(t, cert)
	file := filepath.Join(t.TempDir(), "both.pem")
	if err := os.WriteFile(file, append(certPEM, keyPEM...), 0o600); err != nil {
		t.Fatal(err)
	}
	h := hop{addr: freeaddr.Get(t), tls: &tls.Config{RootCAs: selfsigned.Pool(cert), ServerName: site}}
	cfg, err := config.Parse("test.yaml", fmt.Appendf(nil, `
listeners:
  - listen: [%q]
    mode: https
    certificates: [ { files: { cert: %[2]q, key: %[2]q } } ]
    default: { %[3]s }
limits: { connections_per_source: 4096, requests_per_source: 4096 }
`, h.addr, file, action))
	if err != nil {
		t.Fatal(err)
	}
	o := server.Options{Log: slog.New(slog.DiscardHandler), Version: "test"}
	o.Loops, o.Relay = relaytest.Relay()
	f, err := server.New(cfg, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return h
}

// backend serves HTTP/1.1 and returns its address.
func backend(t *testing.T, handler http.HandlerFunc) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: handler}
	go s.Serve(ln)
	t.Cleanup(func() { s.Close() })
	return ln.Addr().String()
}

// dial connects to the hop over TLS.
func (h hop) dial(ctx context.Context, alpn ...string) (*tls.Conn, error) {
	c := h.tls.Clone()
	c.NextProtos = alpn
	d := tls.Dialer{Config: c}
	conn, err := d.DialContext(ctx, "tcp", h.addr)
	if err != nil {
		return nil, err
	}
	return conn.(*tls.Conn), nil
}
