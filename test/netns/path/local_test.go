package path

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// TestLocal: a container on a bridge is reached past TCP, found by its address alone, in its own network
// namespace and cgroup.
func TestLocal(t *testing.T) {
	s := world(t)
	const config = "/etc/tailsplice/local.yaml"
	err := s.Laptop.WriteFile(config, []byte(`listeners:
  - { name: local, listen: ["127.0.0.1:8090"], mode: tcp, default: { forward: "docker://blog:8080", datapath: sk_msg } }
control: { socket: /run/tailsplice/local.sock }
`), 0o644)
	if err != nil {
		t.Fatal(err)
	}
	bin, err := lab.BuildTailsplice(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p, err := s.Laptop.StartProcess("tailsplice-local", []string{bin, "run", "--config", config}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Stop(5 * time.Second)
	d := &lab.Daemon{Process: p}

	defer func() {
		if t.Failed() {
			out, err := s.Laptop.Command(context.Background(), bin, "status", "--control",
				"/run/tailsplice/local.sock").CombinedOutput()
			t.Logf("%s%v", out, err)
		}
	}()

	web := &http.Client{Timeout: patience, Transport: &http.Transport{DialContext: s.Laptop.Dial,
		DisableKeepAlives: true}}
	send := func(method, path string, body io.Reader) ([]byte, http.Header, error) {
		req, err := http.NewRequestWithContext(context.Background(), method, "http://127.0.0.1:8090"+path,
			body)
		if err != nil {
			return nil, nil, err
		}
		res, err := web.Do(req)
		if err != nil {
			return nil, nil, err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		return b, res.Trailer, err
	}
	ended := func(datapath string) (n int) {
		for _, l := range d.LogLines() {
			if l["msg"] == "flow ended" && l["datapath"] == datapath {
				n++
			}
		}
		return n
	}
	eventually(t, "a flow past TCP", func() error { // the first is how the container becomes known
		if _, _, err := send("GET", "/status?code=204", nil); err != nil {
			return err
		}
		if ended("sk_msg") == 0 {
			return fmt.Errorf("%d flows by sockmap, and none past TCP", ended("sockmap"))
		}
		return nil
	})
	for range 10 {
		b, trailer, err := send("GET", "/bytes?n=5000000&seed=7", nil)
		if sum := sha256.Sum256(b); err != nil || len(b) != 5_000_000 ||
			!strings.EqualFold(hex.EncodeToString(sum[:]), trailer.Get("X-Sha256")) {
			t.Fatalf("%d bytes down, %v", len(b), err)
		}
		var got struct {
			Sha256 string
			Bytes  int
		}
		answer, _, err := send("POST", "/upload", bytes.NewReader(b))
		if err == nil {
			err = json.Unmarshal(answer, &got)
		}
		if err != nil || got.Bytes != len(b) || !strings.EqualFold(got.Sha256, trailer.Get("X-Sha256")) {
			t.Fatalf("%d bytes up, %v: %+v", len(b), err, got)
		}
	}
	eventually(t, "its flows in the log", func() error {
		if n := ended("sk_msg"); n < 11 { // a container's socket may come to be too late for a flow
			return fmt.Errorf("%d flows past TCP, %d by sockmap", n, ended("sockmap"))
		}
		return nil
	})
}
