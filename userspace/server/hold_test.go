package server

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/dial"
)

// TestHold holds requests for a target that comes while they wait, for one that
// does not, and for a client that leaves. Who a node is doesn't matter here.
func TestHold(t *testing.T) {
	addr, target := freeAddr(t), freeAddr(t)
	holding := func(hold time.Duration) *config.Config {
		cfg := parse(t, fmt.Sprintf(`listeners: [{ listen: %q, mode: http, default: { forward: %q } }]`, addr, target))
		cfg.Listeners[0].Default.Hold = hold // the file could say so of a node only
		return cfg
	}
	d := startConfig(t, holding(time.Minute))

	type answer struct {
		body   string
		status int
	}
	answers := make(chan answer, 1)
	go func() {
		res, err := http.Post("http://"+addr, "text/plain", strings.NewReader(strings.Repeat("x", 1<<20)))
		if err != nil {
			answers <- answer{err.Error(), 0}
			return
		}
		defer res.Body.Close()
		b, _ := io.ReadAll(res.Body)
		answers <- answer{string(b), res.StatusCode}
	}()
	eventually(t, "the request waits", func() bool { return d.held.Load() == 1 })
	ln, err := net.Listen("tcp", target)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, n, err)
	})}
	go srv.Serve(ln)
	if a := <-answers; a.status != 200 || a.body != fmt.Sprint(1<<20, nil) {
		t.Errorf("the request that waited: %+v", a)
	}
	srv.Close()

	// Clients leave: one whose body nobody has read, and one without.
	for _, head := range []string{"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n"} {
		c := dialTCP(t, addr)
		io.WriteString(c, head)
		eventually(t, "the request waits", func() bool { return d.held.Load() == 1 })
		c.Close()
		eventually(t, "it no longer does", func() bool { return d.held.Load() == 0 })
	}
	eventually(t, "both are said to have left", func() bool { return strings.Count(d.log.String(), "status=499") == 2 })

	// There is no place left to wait in.
	d.held.Add(heldMost)
	if res, _ := ask(t, addr, "GET", "a", "/", nil); res.StatusCode != 502 {
		t.Errorf("without a place to wait: %d", res.StatusCode)
	}
	d.held.Add(-heldMost)
	if err := d.Reload(holding(time.Second)); err != nil {
		t.Fatal(err)
	}
	if res, _ := ask(t, addr, "GET", "a", "/", nil); res.StatusCode != 502 {
		t.Errorf("after the wait: %d", res.StatusCode)
	}
}

func TestMayComeBack(t *testing.T) {
	for reason, want := range map[dial.Reason]bool{dial.NodeOffline: true, dial.Timeout: true, dial.Refused: true, dial.UnknownNode: false, dial.NoTailscaled: false, dial.Canceled: false} {
		if got := mayComeBack(fmt.Errorf("x: %w", &dial.Error{Reason: reason})); got != want {
			t.Errorf("%s: %v", reason, got)
		}
	}
	if mayComeBack(errors.New("x")) {
		t.Error("an error of another kind")
	}
}
