package stream

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"testing"
	"time"
)

func TestHelloIsReal(t *testing.T) {
	hello, err := Hello()
	if err != nil {
		t.Fatal(err)
	}
	a, b := net.Pipe()
	defer a.Close()
	go func() {
		a.Write(hello)
		io.Copy(io.Discard, a)
	}()
	name := ""
	tls.Server(b, &tls.Config{GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		name = h.ServerName
		return nil, io.EOF
	}}).Handshake()
	if name != ServerName {
		t.Errorf("a TLS server reads the name %q", name)
	}
	if len(hello) < 1000 {
		t.Errorf("%d bytes: a hello with a post-quantum key share is longer", len(hello))
	}
}

func TestPatternFindsEveryShift(t *testing.T) {
	up, down := Phases(3)
	for name, got := range map[string][]byte{
		"another flow's":    At(up+257, 1000, 100),
		"the other way's":   At(down, 1000, 100),
		"shifted by one":    At(up, 1001, 100),
		"shifted by a page": At(up, 1000+4096, 100),
		"shifted by an MSS": At(up, 1000+1448, 100),
	} {
		if Check(up, 1000, got) == nil {
			t.Errorf("%s bytes pass", name)
		}
	}
	for offset := int64(0); offset < 3*Period; offset += 30011 {
		if !bytes.Equal(At(up, offset, Chunk)[Period:], At(up, offset+Period, Chunk-Period)) {
			t.Errorf("at %d the pattern does not go on", offset)
		}
		if err := Check(up, offset, At(up, offset, Chunk)); err != nil {
			t.Error(err)
		}
	}
}

func TestCommand(t *testing.T) {
	want := Command{Source, 7, 70000, 200, 30 * time.Millisecond, 2 * time.Second}
	b := want.Append(nil)
	got, err := ParseCommand(b)
	if err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
	b[0] ^= 1
	if _, err := ParseCommand(b); err == nil {
		t.Error("garbage passes for a command")
	}
	if _, err := ParseCommand(Command{Op: Echo}.Append(nil)); err == nil {
		t.Error("an echo of nothing passes")
	}
}
