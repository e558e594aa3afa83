package path

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/client"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// TestLabels: a container with labels is served as soon as it answers, has its 503 at once when it is killed, and is
// back when it runs again. What others label wrongly, or want too, disturbs nobody.
func TestLabels(t *testing.T) {
	s := world(t)
	config := strings.Replace(laptopConfig, limits, `  - name: local
    listen: ["127.0.0.1:8081"]
    mode: http
    docker: { enabled: true }
    routes: [{ host: [fixed.example], forward: "docker://blog:8080" }]
`+limits, 1)
	s.configure(t, s.laptop, config)
	web := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DialContext: s.Laptop.Dial, DisableKeepAlives: true}}
	// ask requests a page, and returns its status and the container that made it.
	ask := func(host, path string) (string, error) {
		req, err := http.NewRequest("GET", "http://127.0.0.1:8081"+path, nil)
		if err != nil {
			return "", err
		}
		req.Host = host
		res, err := web.Do(req)
		if err != nil {
			return "", err
		}
		defer res.Body.Close()
		b, _ := io.ReadAll(res.Body)
		var f facts
		json.Unmarshal(b, &f)
		return strings.TrimSpace(fmt.Sprint(res.StatusCode, " ", f.Container)), nil
	}
	// wants waits until that is so, and says how long it took.
	wants := func(within time.Duration, host, path, want string) {
		t.Helper()
		began := time.Now()
		eventually(t, within, host+path, func() error {
			if got, err := ask(host, path); err != nil || got != want {
				return fmt.Errorf("%q, %v: want %q", got, err, want)
			}
			return nil
		})
		t.Logf("%s%s: %s after %v", host, path, want, time.Since(began))
	}
	run := func(name string, labels ...string) {
		t.Helper()
		m := map[string]string{}
		for _, l := range labels {
			k, v, _ := strings.Cut(l, "=")
			m["tailsplice."+k] = v
		}
		t.Cleanup(func() { s.Docker.Remove(context.Background(), name) })
		if _, err := s.Docker.RunBlog(t.Context(), name, m); err != nil {
			t.Fatal(err)
		}
	}
	const soon = 5 * time.Second // seconds for what takes milliseconds: the machine may be busy

	wants(soon, "one.example", "/headers", "404")
	run("one", "host=one.example, Uno.example")
	wants(soon, "one.example", "/headers", "200 one")
	wants(soon, "uno.example", "/headers", "200 one")

	run("two", "host=one.example,two.example,fixed.example") // of which one.example and fixed.example are taken
	run("three", "host=one.example", "path=/headers", "port=8080")
	run("typo", "host=typo.example", "prot=8080")
	wants(soon, "two.example", "/headers", "200 two")
	wants(soon, "one.example", "/headers", "200 three")
	wants(soon, "one.example", "/status", "200")
	wants(soon, "fixed.example", "/headers", "200 blog")
	wants(soon, "typo.example", "/headers", "404")

	out, err := s.laptop.CLI(t.Context(), "status")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`ignored: container two, tailsplice.host: "one.example" belongs to container one already (on local)`,
		`ignored: container two, tailsplice.host: "fixed.example" belongs to a configured route already (on local)`,
		`ignored: container typo, tailsplice.prot: unknown label, did you mean "tailsplice.port"?`,
		"docker://three:8080", "container three", "config",
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("status does not say %s:\n%s", want, out)
		}
	}
	for _, c := range []string{"two", "typo"} {
		if !slices.ContainsFunc(s.laptop.LogLines(), func(l lab.LogLine) bool {
			return l["msg"] == "a container's label is ignored" && l["container"] == c
		}) {
			t.Errorf("the log does not say what is wrong with the labels of %s", c)
		}
	}

	// A request under way on another route is none of its business.
	slow := make(chan string, 1)
	go func() { got, _ := ask("two.example", "/sleep?for=3s"); slow <- got }()
	if _, err := s.Docker.Client.ContainerKill(t.Context(), "one", client.ContainerKillOptions{}); err != nil {
		t.Fatal(err)
	}
	wants(soon, "uno.example", "/headers", "503")
	wants(soon, "one.example", "/status", "200") // container two's by now: it runs
	if _, err := s.Docker.Client.ContainerStart(t.Context(), "one", client.ContainerStartOptions{}); err != nil {
		t.Fatal(err)
	}
	wants(soon, "uno.example", "/headers", "200 one")
	if got := <-slow; got != "200" {
		t.Errorf("the request that went on meanwhile: %s", got)
	}
	if err := s.Docker.Remove(t.Context(), "three"); err != nil {
		t.Fatal(err)
	}
	wants(soon, "one.example", "/headers", "503") // until it is replaced, or forgotten
	// Without docker its routes are gone; the configured ones stay.
	if err := s.laptop.SetConfig(strings.Replace(config, "enabled: true", "enabled: false", 1)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.laptop.CLI(t.Context(), "reload"); err != nil {
		t.Fatal(err)
	}
	wants(soon, "uno.example", "/headers", "404")
	wants(soon, "fixed.example", "/headers", "200 blog")
}
