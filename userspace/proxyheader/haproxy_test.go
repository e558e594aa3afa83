package proxyheader

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/selfsigned"
)

// haproxy starts a real haproxy with a configuration in which fd@3 and up are the listeners that are given. What it
// logs to stdout comes out of the channel, line by line.
func haproxy(t *testing.T, config string, listeners ...net.Listener) (lines <-chan string) {
	t.Helper()
	path, err := exec.LookPath("haproxy")
	if err != nil {
		path, err = exec.LookPath("/usr/sbin/haproxy") // sbin is not in everyone's PATH
	}
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("haproxy is not installed")
		}
		t.Skip("haproxy is not installed")
	}
	file := filepath.Join(t.TempDir(), "haproxy.cfg")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	// The shell stops haproxy when its input ends, which it does however this process ends.
	cmd := exec.Command("sh", "-c", `"$0" -db -f "$1" </dev/null & read _; kill $!; wait`, path, file)
	input, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	for _, ln := range listeners {
		f, err := ln.(*net.TCPListener).File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var complaints strings.Builder
	cmd.Stderr = &complaints
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ch := make(chan string, 100)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer close(ch)
		for s := bufio.NewScanner(out); s.Scan(); {
			ch <- s.Text()
		}
	}()
	t.Cleanup(func() {
		input.Close()
		<-done
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("haproxy says: %s", complaints.String())
		}
	})
	return ch
}

// haproxyDefaults ask for one thread: two that log at once may lose a line.
const haproxyDefaults = `
global
	nbthread 1
	log stdout format raw local0
defaults
	mode tcp
	log global
	timeout connect 1m
	timeout client 1m
	timeout server 1m
`

func listen(t *testing.T, addr string) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// certificate writes a self-signed certificate and its key into one file, as haproxy wants it.
func certificate(t *testing.T) (file string) {
	cert, key := selfsigned.PEM(t, selfsigned.Certificate(t, "example.org"))
	file = filepath.Join(t.TempDir(), "cert.pem")
	if err := os.WriteFile(file, append(cert, key...), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestFromHAProxy reads what haproxy sends in front of a connection.
func TestFromHAProxy(t *testing.T) {
	cert := certificate(t)
	const id = "unique-id-format %{+X}o\\ %ci:%cp_%fi:%fp_%Ts_%rt:%pid"
	tests := []struct {
		name   string
		listen string // haproxy's
		bind   string
		server string
		tls    bool
		want   Header // without addresses, and with ID just "set"
	}{
		{"v1", "127.0.0.1:0", "", "send-proxy", false, Header{}},
		{"v2", "127.0.0.1:0", "", "send-proxy-v2", false, Header{}},
		{"v2 over ipv6", "[::1]:0", "", "send-proxy-v2", false, Header{}},
		{"v2 with a checksum", "127.0.0.1:0", "", "send-proxy-v2 proxy-v2-options crc32c", false, Header{}},
		{"v2 with everything", "127.0.0.1:0", "ssl crt " + cert + " alpn h2,http/1.1",
			"send-proxy-v2 proxy-v2-options authority,unique-id,ssl,ssl-cipher,cert-sig,crc32c", true, Header{ServerName: "www.example.org", ALPN: "h2", ID: "set"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			front, us := listen(t, tt.listen), listen(t, "127.0.0.1:0")
			lines := haproxy(t, fmt.Sprintf("%s\nlisten l\n\tbind fd@3 %s\n\t%s\n\tserver us %s %s\n", haproxyDefaults, tt.bind, id, us.Addr(), tt.server), front)
			go func() {
				for range lines {
				}
			}()
			client, err := net.Dial("tcp", front.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			client.SetDeadline(time.Now().Add(patience))
			go func() {
				w := io.Writer(client)
				if tt.tls {
					w = tls.Client(client, &tls.Config{ServerName: "WWW.example.org", NextProtos: []string{"h2"}, InsecureSkipVerify: true})
				}
				w.Write([]byte("what follows"))
			}()
			us.(*net.TCPListener).SetDeadline(time.Now().Add(patience))
			c, err := us.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			h, rest, err := Read(c, nil, 4096, patience)
			if err != nil || h == nil {
				t.Fatalf("%+v, %v", h, err)
			}
			c.SetDeadline(time.Now().Add(patience))
			for len(rest) < len("what follows") {
				buf := make([]byte, 100)
				n, err := c.Read(buf)
				if err != nil {
					t.Fatal(err)
				}
				rest = append(rest, buf[:n]...)
			}
			if string(rest) != "what follows" {
				t.Errorf("%q follows", rest)
			}
			if h.ID != "" {
				t.Logf("unique id %s", h.ID)
				h.ID = "set"
			}
			tt.want.Source = client.LocalAddr().(*net.TCPAddr).AddrPort()
			tt.want.Destination = client.RemoteAddr().(*net.TCPAddr).AddrPort()
			if *h != tt.want {
				t.Errorf("got %+v, want %+v", *h, tt.want)
			}
		})
	}
}

// TestToHAProxy sends headers to haproxy, which logs what it understood.
func TestToHAProxy(t *testing.T) {
	ln := listen(t, "127.0.0.1:0")
	lines := haproxy(t, haproxyDefaults+`
listen l
	mode http
	bind fd@3 accept-proxy
	log-format "src=[%ci]:%cp dst=[%fi]:%fp authority=%[fc_pp_authority] id=%[fc_pp_unique_id]"
	http-request return status 200 content-type text/plain string "hello"
`, ln)
	own := ln.Addr().(*net.TCPAddr).AddrPort()
	tests := []struct {
		name string
		h    Header
		want string // %s is the client's real address
	}{
		{"tcp4", with(v4, "example.org", "h2", "0191e3b6c1d27a3f"), "src=[192.0.2.1]:12345 dst=[198.51.100.2]:443 authority=example.org id=0191e3b6c1d27a3f"},
		{"tcp6", v6, "src=[2001:db8::1]:12345 dst=[2001:db8::2]:443 authority=- id=-"},
		{"mixed", Header{Source: v6.Source, Destination: v4.Destination}, "src=[2001:db8::1]:12345 dst=[::ffff:198.51.100.2]:443 authority=- id=-"},
		{"no destination", Header{Source: v4.Source}, "src=[192.0.2.1]:12345 dst=[0.0.0.0]:0 authority=- id=-"},
		{"unknown", Header{ID: "0191e3b6c1d27a3f"}, "src=[0.0.0.0]:0 dst=[0.0.0.0]:0 authority=- id=0191e3b6c1d27a3f"},
		{"local", Header{Local: true}, "src=%s dst=" + bracketed(own) + " authority=- id=-"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, err := net.Dial("tcp", ln.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			c.Write(append(tt.h.Append(nil), "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"...))
			answer, err := io.ReadAll(c)
			if err != nil || !strings.HasSuffix(string(answer), "hello") {
				t.Errorf("haproxy answers %q, %v", answer, err)
			}
			want := strings.ReplaceAll(tt.want, "%s", bracketed(c.LocalAddr().(*net.TCPAddr).AddrPort()))
			for line := ""; !strings.HasPrefix(line, "src="); { // others on this machine may have tried this port
				select {
				case line = <-lines:
				case <-time.After(patience):
					t.Fatal("haproxy logged nothing")
				}
				if strings.HasPrefix(line, "src=") && !strings.Contains(line, want) {
					t.Errorf("haproxy understood %q, want %q", line, want)
				}
			}
		})
	}
}

func bracketed(a netip.AddrPort) string { return fmt.Sprintf("[%s]:%d", a.Addr(), a.Port()) }
