package path

import (
	"bufio"
	"context"
	"crypto/tls"
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

// TestLabels: a container with labels is served as soon as it answers, has its 503 at once when it is killed,
// and is back when it runs again. What others label wrongly, or want too, disturbs nobody.
func TestLabels(t *testing.T) {
	s := world(t)
	config := strings.Replace(laptopConfig, limits, `  - name: local
    listen: ["127.0.0.1:8081"]
    mode: http
    docker: { enabled: true }
    routes: [{ host: [fixed.example], forward: "docker://blog:8080" }]
  - name: hellos
    listen: ["127.0.0.1:8444"]
    mode: sni
    docker: { enabled: true }
`+limits, 1)
	s.configure(t, s.laptop, config)
	web := &http.Client{Timeout: patience, Transport: &http.Transport{DialContext: s.Laptop.Dial,
		DisableKeepAlives: true}}
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
	wants := func(host, path, want string) {
		t.Helper()
		began := time.Now()
		eventually(t, host+path, func() error {
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
	wants("one.example", "/headers", "404")
	run("one", "host=one.example, Uno.example")
	wants("one.example", "/headers", "200 one")
	wants("uno.example", "/headers", "200 one")

	// Of which one.example and fixed.example are taken.
	run("two", "host=one.example,two.example,fixed.example")
	run("three", "host=one.example", "path=/headers", "port=8080")
	run("typo", "host=typo.example", "prot=8080")
	wants("two.example", "/headers", "200 two")
	wants("one.example", "/headers", "200 three")
	wants("one.example", "/status", "200")
	wants("fixed.example", "/headers", "200 blog")
	wants("typo.example", "/headers", "404")

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
	if _, err := s.Docker.Client.ContainerKill(t.Context(), "one",
		client.ContainerKillOptions{}); err != nil {
		t.Fatal(err)
	}
	wants("uno.example", "/headers", "503")
	wants("one.example", "/status", "200") // container two's by now: it runs
	if _, err := s.Docker.Client.ContainerStart(t.Context(), "one",
		client.ContainerStartOptions{}); err != nil {
		t.Fatal(err)
	}
	wants("uno.example", "/headers", "200 one")
	if got := <-slow; got != "200" {
		t.Errorf("the request that went on meanwhile: %s", got)
	}
	if err := s.Docker.Remove(t.Context(), "three"); err != nil {
		t.Fatal(err)
	}
	wants("one.example", "/headers", "503") // until it is replaced, or forgotten
	// A container that speaks TLS itself: its own certificate, and nobody on the way with a key.
	run("secure", "host=secure.example", "port=8443", "tls=passthrough")
	byTLS := func(name, want string) {
		t.Helper()
		eventually(t, name+" by TLS", func() error {
			got, err := handshake(t.Context(), s.Laptop, name)
			if err != nil {
				got = err.Error()
			}
			if !strings.Contains(got, want) {
				return fmt.Errorf("%s: want %s", got, want)
			}
			return nil
		})
	}
	byTLS("secure.example", "secure HTTP/1.1 200 OK")
	byTLS("uno.example", "unrecognized name") // http only
	wants("secure.example", "/headers", "404")
	if _, err := s.Docker.Client.ContainerKill(t.Context(), "secure",
		client.ContainerKillOptions{}); err != nil {
		t.Fatal(err)
	}
	byTLS("secure.example", "internal error")
	if _, err := s.Docker.Client.ContainerStart(t.Context(), "secure",
		client.ContainerStartOptions{}); err != nil {
		t.Fatal(err)
	}
	byTLS("secure.example", "secure HTTP/1.1 200 OK")

	// Without docker its routes are gone; the configured ones stay.
	if err := s.laptop.SetConfig(strings.Replace(config, "enabled: true", "enabled: false", 1)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.laptop.CLI(t.Context(), "reload"); err != nil {
		t.Fatal(err)
	}
	wants("uno.example", "/headers", "404")
	wants("fixed.example", "/headers", "200 blog")
}

// handshake asks for a page by TLS, and returns the name on the certificate and the first line of the answer.
func handshake(ctx context.Context, from *lab.Host, name string) (string, error) {
	raw, err := from.Dial(ctx, "tcp", "127.0.0.1:8444")
	if err != nil {
		return "", err
	}
	defer raw.Close()
	raw.SetDeadline(time.Now().Add(patience))
	c := tls.Client(raw, &tls.Config{ServerName: name, InsecureSkipVerify: true})
	if err := c.Handshake(); err != nil {
		return "", err
	}
	fmt.Fprintf(c, "GET /headers HTTP/1.0\r\nHost: %s\r\n\r\n", name)
	line, err := bufio.NewReader(c).ReadString('\n')
	return c.ConnectionState().PeerCertificates[0].Subject.CommonName + " " +
		strings.Replace(line, "1.0", "1.1", 1), err
}
