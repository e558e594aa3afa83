package server

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/tailsplice/tailsplice/userspace/container"
)

// box is a running container; its id is its name.
func box(name string, labels ...string) container.Labelled {
	c := container.Labelled{ID: name, Name: name, Labels: map[string]string{}, Ports: []uint16{80}, Running: true}
	for _, l := range labels {
		k, v, _ := strings.Cut(l, "=")
		c.Labels["tailsplice."+k] = v
	}
	return c
}

// TestDockerBehindFilter: a daemon whose Docker hides /info serves what labels ask for, by the replica that is healthy,
// and its status says both.
func TestDockerBehindFilter(t *testing.T) {
	port := "0"
	for _, c := range []struct{ addr, body string }{{"127.0.0.1", "healthy"}, {"127.0.0.2", "unhealthy"}} {
		ln, err := net.Listen("tcp", net.JoinHostPort(c.addr, port))
		if err != nil {
			t.Fatal(err)
		}
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, c.body) })}
		go server.Serve(ln)
		defer server.Close()
		port = portOf(ln.Addr().String())
	}
	replica := func(n, health, addr string) string {
		return fmt.Sprintf(`{"Id":%q,"Names":["/shop-web-%s"],"State":"running","Status":"Up 1 minute (%s)",
			"Labels":{"tailsplice.host":"a.org","tailsplice.port":%q,"com.docker.compose.project":"shop","com.docker.compose.service":"web"},
			"NetworkSettings":{"Networks":{"bridge":{"IPAddress":%q}}}}`, strings.Repeat(n, 64), n, health, port, addr)
	}
	list := "[" + replica("1", "unhealthy", "127.0.0.2") + "," + replica("2", "healthy", "127.0.0.1") + "]"
	socket := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	docker := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", "1.41")
		w.Header().Set("Content-Type", "application/json")
		switch {
		case r.URL.Path == "/_ping":
		case strings.HasSuffix(r.URL.Path, "/containers/json"):
			io.WriteString(w, list)
		case strings.HasSuffix(r.URL.Path, "/json"):
			io.WriteString(w, `{"Config":{}}`)
		case strings.HasSuffix(r.URL.Path, "/events"):
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		default:
			http.Error(w, `{"message":"forbidden by the filter"}`, http.StatusForbidden)
		}
	})}
	go docker.Serve(ln)
	defer docker.Close()
	t.Setenv("DOCKER_HOST", "unix://"+socket)
	addr := freeAddr(t)
	d := start(t, fmt.Sprintf(`listeners: [{ name: web, listen: [%q], mode: http, docker: { enabled: true }, routes: [{ host: [b.org], forward: "docker://web:%s" }] }]`, addr, port))
	for _, host := range []string{"a.org", "b.org"} {
		for range 4 { // the replicas would take turns
			if res, body := ask(t, addr, "GET", host, "/", nil); res.StatusCode != 200 || body != "healthy" {
				t.Errorf("%s: %d: %s", host, res.StatusCode, body)
			}
		}
	}
	s := d.Status()
	if len(s.Problems) != 1 || s.Problems[0].Part != PartContainers || !strings.Contains(s.Problems[0].Problem, "/info") {
		t.Errorf("the problems are %q", s.Problems)
	}
	for _, r := range s.Listeners[0].Routes {
		if !slices.Equal(r.Ailing, []string{"shop-web-1 is unhealthy"}) {
			t.Errorf("route %s: ailing is %q", r.Match, r.Ailing)
		}
	}
	if len(s.Listeners[0].Routes) != 2 {
		t.Errorf("routes %+v", s.Listeners[0].Routes)
	}
}
