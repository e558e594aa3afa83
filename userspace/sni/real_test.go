package sni

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// capture returns what a client sends first to a server on the loopback interface. The server is crypto/tls, which
// decides when the hello is complete, and then refuses it.
func capture(t *testing.T, client func(ctx context.Context, addr string)) []byte {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	hello := make(chan []byte, 1)
	go func() {
		defer close(hello)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			tee := &recorder{Conn: c}
			complete := false
			server := tls.Server(tee, &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
				complete = true
				return nil, errors.New("seen enough")
			}})
			err = server.HandshakeContext(ctx)
			c.Close()
			if complete {
				hello <- tee.seen.Bytes()
				return
			}
			t.Logf("a connection without a hello: %v", err)
		}
	}()
	done := make(chan struct{})
	go func() { defer close(done); client(ctx, ln.Addr().String()) }()
	select {
	case b := <-hello:
		cancel()
		<-done
		return b
	case <-done: // the client gave up, perhaps after its hello was taken
	}
	ln.Close()
	b, ok := <-hello
	if !ok {
		t.Fatal("the client sent no hello")
	}
	return b
}

type recorder struct {
	net.Conn
	seen bytes.Buffer
}

func (r *recorder) Read(b []byte) (int, error) {
	n, err := r.Conn.Read(b)
	r.seen.Write(b[:n])
	return n, err
}

// protocols is an ALPN list of about n bytes: the way to make a real client's hello long.
func protocols(n int) []string {
	var list []string
	for i := range n / 250 {
		list = append(list, fmt.Sprintf("%0249d", i))
	}
	return list
}

func TestGo(t *testing.T) {
	tests := []struct {
		name   string
		config *tls.Config
		want   Hello
		min    int // bytes
	}{
		{"default, with a post-quantum key share", &tls.Config{ServerName: "example.org"}, Hello{ServerName: "example.org"}, 1200},
		{"alpn", &tls.Config{ServerName: "Example.ORG", NextProtos: []string{"h2", "http/1.1", "x"}},
			Hello{ServerName: "example.org", ALPN: []string{"h2", "http/1.1", "x"}}, 0},
		{"tls 1.3 only", &tls.Config{ServerName: "a.b", MinVersion: tls.VersionTLS13}, Hello{ServerName: "a.b"}, 0},
		{"tls 1.2", &tls.Config{ServerName: "a.b", MaxVersion: tls.VersionTLS12}, Hello{ServerName: "a.b"}, 0},
		{"tls 1.0 to 1.3", &tls.Config{ServerName: "a.b", MinVersion: tls.VersionTLS10}, Hello{ServerName: "a.b"}, 0},
		{"tls 1.0 to 1.1", &tls.Config{ServerName: "a.b", MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}, Hello{ServerName: "a.b"}, 0},
		{"tls 1.0", &tls.Config{ServerName: "a.b", MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS10}, Hello{ServerName: "a.b"}, 0},
		{"no name", &tls.Config{InsecureSkipVerify: true}, Hello{}, 0},
		{"an address, which is no name", &tls.Config{ServerName: "192.0.2.1"}, Hello{}, 0},
		{"longest name", &tls.Config{ServerName: longName}, Hello{ServerName: longName}, 0},
		{"16 KiB", &tls.Config{ServerName: "a.b", NextProtos: protocols(16 << 10)}, Hello{ServerName: "a.b", ALPN: protocols(16 << 10)}, 16 << 10},
		{"32 KiB", &tls.Config{ServerName: "a.b", NextProtos: protocols(32 << 10)}, Hello{ServerName: "a.b", ALPN: protocols(32 << 10)}, 32 << 10},
		{"ech", &tls.Config{ServerName: "secret.example", MinVersion: tls.VersionTLS13, EncryptedClientHelloConfigList: echConfigs(t, "public.example")},
			Hello{ServerName: "public.example"}, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			stream := capture(t, func(ctx context.Context, addr string) {
				d := tls.Dialer{Config: tt.config}
				if tt.config.ServerName == "" {
					d.Config.ServerName = "127.0.0.1" // stops Dialer from guessing; crypto/tls sends no address
				}
				if c, err := d.DialContext(ctx, "tcp", addr); err == nil {
					c.Close()
				}
			})
			h := check(t, stream)
			if !same(h, tt.want) || h.Length < tt.min || h.Length != len(stream) {
				t.Errorf("got %.300v of %d bytes, want %.300v of at least %d", fmt.Sprint(h), len(stream), fmt.Sprint(tt.want), tt.min)
			}
		})
	}
}

var longName = strings.Repeat(strings.Repeat("a", 63)+".", 3) + strings.Repeat("b", 61)

// echConfigs is an ECHConfigList of RFC 9849 with a fresh key, of one server.
func echConfigs(t *testing.T, public string) []byte {
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	config := builder{1} // config_id
	config = config.uint16(0x20).vector16(key.PublicKey().Bytes())
	config = config.vector16(builder{}.uint16(1).uint16(1)) // HKDF-SHA256, AES-128-GCM
	config = append(config, 64).vector8([]byte(public)).vector16(nil)
	return builder{}.vector16(builder{}.ext(0xfe0d, config))
}

func TestOpenSSL(t *testing.T) {
	openssl := need(t, "openssl")
	long := protocols(16 << 10)
	tests := []struct {
		name string
		args []string
		want Hello
	}{
		{"default", []string{"-servername", "WWW.Example.org"}, Hello{ServerName: "www.example.org"}},
		{"alpn", []string{"-servername", "a.b", "-alpn", "h2,http/1.1"}, Hello{ServerName: "a.b", ALPN: []string{"h2", "http/1.1"}}},
		{"tls 1.3", []string{"-servername", "a.b", "-tls1_3"}, Hello{ServerName: "a.b"}},
		{"tls 1.2", []string{"-servername", "a.b", "-tls1_2"}, Hello{ServerName: "a.b"}},
		{"tls 1.1", []string{"-servername", "a.b", "-tls1_1", "-cipher", "ALL:@SECLEVEL=0"}, Hello{ServerName: "a.b"}},
		{"tls 1.0", []string{"-servername", "a.b", "-tls1", "-cipher", "ALL:@SECLEVEL=0"}, Hello{ServerName: "a.b"}},
		{"no name", []string{"-noservername"}, Hello{}},
		{"16 KiB", []string{"-servername", "a.b", "-alpn", strings.Join(long, ",")}, Hello{ServerName: "a.b", ALPN: long}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			stream := capture(t, func(ctx context.Context, addr string) {
				_ = exec.CommandContext(ctx, openssl, append([]string{"s_client", "-connect", addr}, tt.args...)...).Run() // fails
			})
			if h := check(t, stream); !same(h, tt.want) {
				t.Errorf("got %.300v, want %.300v", fmt.Sprint(h), fmt.Sprint(tt.want))
			}
		})
	}
}

func TestCurl(t *testing.T) {
	curl := need(t, "curl")
	stream := capture(t, func(ctx context.Context, addr string) {
		_, port, _ := net.SplitHostPort(addr)
		_ = exec.CommandContext(ctx, curl, "-sk", "--connect-to", "::127.0.0.1:"+port, "https://Blog.Example.org/").Run() // fails
	})
	h := check(t, stream)
	if h.ServerName != "blog.example.org" || !slices.Contains(h.ALPN, "http/1.1") {
		t.Errorf("got %+v", h)
	}
}

var recordFlag = flag.Bool("record", false, "record testdata/chromium.hello from the chromium that is installed")

// TestChromium uses a hello that was recorded with -record: starting the browser takes too long for every run.
func TestChromium(t *testing.T) {
	file := filepath.Join("testdata", "chromium.hello")
	if *recordFlag {
		chromium := need(t, "chromium")
		stream := capture(t, func(ctx context.Context, addr string) {
			_, port, _ := net.SplitHostPort(addr)
			cmd := exec.CommandContext(ctx, chromium, "--headless", "--no-sandbox", "--disable-gpu", "--user-data-dir="+t.TempDir(),
				"--no-first-run", "--disable-background-networking", "--disable-quic",
				"--host-resolver-rules=MAP example.vsq.cz 127.0.0.1:"+port+", MAP * ~NOTFOUND", "--dump-dom", "https://Example.vsq.cz/")
			cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
			cmd.WaitDelay = 5 * time.Second
			cmd.Stdout, cmd.Stderr = io.Discard, io.Discard
			_ = cmd.Run()
		})
		if err := os.WriteFile(file, stream, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	stream, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	h := check(t, stream)
	want := Hello{ServerName: "example.vsq.cz", ALPN: []string{"h2", "http/1.1"}}
	if !same(h, want) {
		t.Errorf("got %+v, want %+v", h, want)
	}
	if h.Length < 1500 {
		t.Errorf("%d bytes: too short for one with a post-quantum key share", h.Length)
	}
	if !hasGREASE(stream) {
		t.Error("the recorded hello has no GREASE extension")
	}
}

// grease reports whether v is one of the values 0x0a0a, 0x1a1a ... 0xfafa that RFC 8701 reserves.
func grease(v int) bool { return v&0x0f0f == 0x0a0a && v>>8 == v&0xff }

// hasGREASE looks for one of the reserved numbers followed by the same again, in any extension type.
func hasGREASE(b []byte) bool {
	for i := range b[:len(b)-1] {
		if grease(int(b[i])<<8 | int(b[i+1])) {
			return true
		}
	}
	return false
}
