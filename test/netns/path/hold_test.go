package path

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// TestHold: the laptop's tailscaled stops and comes back. Requests wait for it with hold, on connections from
// the pool as on new ones, and each is answered, what may not be repeated by its one connection. Where hold
// is over the page comes.
func TestHold(t *testing.T) {
	s := world(t)
	s.configure(t, s.home, strings.Replace(homeConfig, "    default: { forward: tailnet://laptop:8080 }\n", `    routes:
      - { host: [`+lab.Site+`], path: /status, forward: "tailnet://laptop:8080", hold: 1s }
    default: { forward: "tailnet://laptop:8080", hold: 2m }
`, 1))
	c := s.browser(s.Client, "tcp4", true)
	c.Timeout = 2 * time.Minute
	defer c.CloseIdleConnections()
	ask := func(method, path string) (string, error) {
		var body io.Reader
		if method == "POST" {
			body = strings.NewReader("once")
		}
		req, err := http.NewRequestWithContext(t.Context(), method, "https://"+lab.Site+path, body)
		if err != nil {
			return "", err
		}
		res, err := c.Do(req)
		if err != nil {
			return "", err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		return fmt.Sprint(res.StatusCode, " ", string(b)), err
	}
	all := func(requests ...[2]string) []string {
		answers := make([]string, len(requests))
		var wg sync.WaitGroup
		for i, r := range requests {
			wg.Go(func() {
				var err error
				if answers[i], err = ask(r[0], r[1]); err != nil {
					answers[i] = err.Error()
				}
			})
		}
		wg.Wait()
		return answers
	}
	nap := [2]string{"GET", "/sleep?for=200ms"}
	// Three connections in the pool.
	if got := all(nap, nap, nap); !strings.HasPrefix(got[0]+got[1]+got[2], "200 ") {
		t.Fatal(got)
	}
	s.Laptop.Node.Stop()
	started := false
	start := func() {
		if started {
			return
		}
		started = true
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := s.Laptop.Node.Start(); err != nil {
			t.Error(err)
		} else if err := s.Laptop.Node.Wait(ctx); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(func() {
		start()
		eventually(t, "the path after it",
			func() error { _, err := s.page(context.Background(), "tcp4"); return err })
	})
	// On a connection from the pool, which nobody acknowledges any more.
	if got, err := ask("GET", "/status"); err != nil ||
		!strings.Contains(got, "laptop did not answer in time") {
		t.Errorf("after a hold of 1s: %q, %v", got, err)
	}
	requests := [][2]string{{"POST", "/upload"}, nap, nap, nap, nap, nap}
	answers := make(chan []string, 1)
	go func() { answers <- all(requests...) }()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	if _, err := s.home.WaitLog(ctx, func(l lab.LogLine) bool {
		return l["msg"] == "a request waits for a target that can't be reached" && l["hold"] == "2m0s"
	}); err != nil {
		t.Error(err)
	}
	start()
	for i, got := range <-answers {
		want := map[string]string{"POST": "200 {", "GET": "200 good morning"}[requests[i][0]]
		if !strings.HasPrefix(got, want) {
			t.Errorf("%v: %q, want %q", requests[i], got, want)
		}
	}
	post := func(l lab.LogLine) bool {
		return l["msg"] == "flow ended" && l["path"] == "/upload" && l["method"] == "POST" &&
			l["bytes_up"] == 4.0
	}
	if _, err := s.laptop.WaitLog(ctx, post); err != nil {
		t.Error(err)
	}
	posts := 0
	for _, l := range s.laptop.LogLines() {
		if post(l) {
			posts++
		}
	}
	if posts != 1 {
		t.Errorf("the laptop got the POST %d times", posts)
	}
}
