package server

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/crypto/bcrypt"
)

// TestRevoked takes away the last user and the last authority while connections are kept: from then on nobody
// comes in by them, on these or on new ones, with a session of TLS that was begun before or not, nor after a
// reload that fails for that.
func TestRevoked(t *testing.T) {
	hash, err := bcrypt.GenerateFromPassword([]byte("secret"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	own, _ := certificate(t, "client")
	app := headers(t)
	for _, p := range protocols {
		if !p.tls {
			continue
		}
		for how, take := range map[string]func(file string) error{
			"emptied": func(file string) error { return os.WriteFile(file, nil, 0o600) },
			"removed": os.Remove,
		} {
			t.Run(p.name+" "+how, func(t *testing.T) {
				dir := t.TempDir()
				users, ca := filepath.Join(dir, "users"), filepath.Join(dir, "ca.pem")
				if err := os.WriteFile(users, fmt.Appendf(nil, "me:%s\n", hash), 0o600); err != nil {
					t.Fatal(err)
				}
				writeCA(t, ca, own)
				certs, pool := p.certificateYAML(t)
				addr := freeAddr(t)
				cfg := parse(t, fmt.Sprintf(`
listeners: [{ name: web, listen: %q, mode: %s, %sroutes: [
  { host: app.test, path: /user, forward: %[4]q, basic_auth: { file: %[5]q } },
  { host: app.test, path: /cert, forward: %[4]q, client_certificates: { ca: %[6]q } },
  { host: app.test, forward: %[4]q }] }]`, addr, p.mode(), certs, app, users, ca))
				d := startConfig(t, cfg)
				sessions := tls.NewLRUClientSessionCache(4)
				visitor := func() *http.Client {
					dialled := 0
					c := p.client(t, pool, func() net.Conn {
						if dialled++; dialled > 1 {
							t.Error("the connection is not kept")
						}
						return dialTCP(t, addr)
					})
					conf := c.Transport.(*http.Transport).TLSClientConfig
					conf.ClientSessionCache, conf.Certificates = sessions, []tls.Certificate{own}
					return c
				}
				status := func(c *http.Client, path string) int {
					res, _, _ := p.get(t, c, path, "Authorization: Basic bWU6c2VjcmV0") // me:secret
					return res.StatusCode
				}
				kept := visitor()
				for _, path := range []string{"/", "/user", "/cert"} {
					if got := status(kept, path); got != 200 {
						t.Errorf("%s: %d", path, got)
					}
				}
				for _, file := range []string{users, ca} {
					if err := take(file); err != nil {
						t.Fatal(err)
					}
				}
				eventually(t, "it is noticed", func() bool { return status(kept, "/user") == 401 && status(kept, "/cert") == 403 })
				if err := d.Reload(cfg); err == nil {
					t.Error("a reload takes files with nobody in them")
				}
				for name, c := range map[string]*http.Client{"kept": kept, "new": visitor()} {
					if user, cert, open := status(c, "/user"), status(c, "/cert"), status(c, "/"); user != 401 || cert != 403 || open != 200 {
						t.Errorf("%s connection: %d by password, %d by certificate, %d where all may", name, user, cert, open)
					}
				}
			})
		}
	}
}
