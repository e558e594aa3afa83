package server

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/freeaddr"
	"github.com/tailsplice/tailsplice/test/logs"
	"github.com/tailsplice/tailsplice/test/selfsigned"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// daemon is a server under test.
type daemon struct {
	*Server
	t   *testing.T
	log *logs.Log
}

func parse(t *testing.T, yaml string) *config.Config {
	t.Helper()
	cfg, err := config.Parse("test.yaml", []byte(yaml))
	if err != nil {
		t.Fatalf("config: %v", err)
	}
	return cfg
}

func start(t *testing.T, yaml string) *daemon {
	t.Helper()
	return startConfig(t, parse(t, yaml))
}

func startConfig(t *testing.T, cfg *config.Config) *daemon {
	t.Helper()
	return startOptions(t, cfg, Options{})
}

func startOptions(t *testing.T, cfg *config.Config, o Options) *daemon {
	t.Helper()
	d := &daemon{t: t, log: &logs.Log{}}
	o.Log, o.Version = d.log.Logger(), "test"
	o.Loops, o.Relay = relaytest.Relay()
	f, err := New(cfg, o)
	if err != nil {
		t.Fatal(err)
	}
	d.Server = f
	t.Cleanup(func() {
		f.Close()
		if t.Failed() {
			t.Logf("log:\n%s", d.log)
		}
	})
	return d
}

// discard are the Options of a server whose log nobody reads.
func discard() Options {
	o := Options{Log: slog.New(slog.DiscardHandler), Version: "test"}
	o.Loops, o.Relay = relaytest.Relay()
	return o
}

// freeAddr is an address of 127.0.0.1 that nothing listens on.
func freeAddr(t *testing.T) string {
	t.Helper()
	return freeaddr.Get(t)
}

// freeAddrAt is an address of host that nothing listens on.
func freeAddrAt(t *testing.T, host string) string {
	t.Helper()
	return freeaddr.Of(t, host)
}

// certificate makes a self-signed certificate for names, and a pool that
// trusts it.
func certificate(t *testing.T, names ...string) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	c := selfsigned.Certificate(t, names...)
	return c, selfsigned.Pool(c)
}

// writePair writes a certificate as the config wants it.
func writePair(t *testing.T, c tls.Certificate) (cert, key string) {
	t.Helper()
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	certPEM, keyPEM := selfsigned.PEM(t, c)
	for file, data := range map[string][]byte{cert: certPEM, key: keyPEM} {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

// writeCA replaces a file of authorities.
func writeCA(t *testing.T, file string, certs ...tls.Certificate) {
	t.Helper()
	var data []byte
	for _, c := range certs {
		data = append(data, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]})...)
	}
	if err := os.WriteFile(file+".new", data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
}

// backend accepts connections and hands each to serve.
func backend(t *testing.T, serve func(net.Conn)) string {
	t.Helper()
	return backendOn(t, "127.0.0.1", serve)
}

func backendOn(t *testing.T, host string, serve func(net.Conn)) string {
	t.Helper()
	ln, err := net.Listen("tcp", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil { // out of files, by a test's doing
				time.Sleep(time.Millisecond)
				continue
			}
			go serve(c)
		}
	}()
	return ln.Addr().String()
}

// tlsBackend greets each client with its name.
func tlsBackend(t *testing.T, name string, cert tls.Certificate) string {
	return backend(t, func(c net.Conn) {
		tc := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"acme-tls/1", "h2"}})
		defer tc.Close()
		fmt.Fprintf(tc, "%s\n", name)
	})
}

// echo sends back what it gets.
func echo(c net.Conn) {
	defer c.Close()
	io.Copy(c, c)
}

func dialTLS(addr string, cfg *tls.Config) (string, error) {
	d := &net.Dialer{Timeout: patience}
	c, err := tls.DialWithDialer(d, "tcp", addr, cfg)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	return bufio.NewReader(c).ReadString('\n')
}

// helloFor is the first record of a TLS client.
func helloFor(t *testing.T, name string) []byte {
	t.Helper()
	client, server := net.Pipe()
	defer server.Close()
	go tls.Client(client, &tls.Config{ServerName: name}).Handshake()
	buf := make([]byte, 16<<10)
	n, err := server.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return buf[:n]
}

func dialTCP(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr, patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn)
}

func (d *daemon) refused(reason string) int64 { return d.Status().Refused[reason] }

// patience is for what comes sooner or later, on machines that do more than this.
const patience = time.Minute

// eventually waits until ok.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Errorf("not within %v: %s", patience, what)
}

func httpBackend(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h}
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
	return ln.Addr().String()
}

// byName is the same target as one that has to be looked up.
func byName(addr string) string { return strings.Replace(addr, "127.0.0.1", "localhost", 1) }
