package server

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/acme"
	"github.com/tailsplice/tailsplice/userspace/metrics"
)

// TestCountsByRoute: what lives is seen before it ends.
func TestCountsByRoute(t *testing.T) {
	raw, web, secure, dead := freeAddr(t), freeAddr(t), freeAddr(t), freeAddr(t)
	goOn := make(chan struct{})
	app := httpBackend(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/teapot" {
			w.WriteHeader(http.StatusTeapot)
			return
		}
		io.WriteString(w, strings.Repeat("x", 1000))
		http.NewResponseController(w).Flush()
		<-goOn
		io.WriteString(w, strings.Repeat("x", 500))
	})
	leaf, _ := certificate(t, "good.test")
	cert, key := writePair(t, leaf)
	d := startOptions(t, parse(t, fmt.Sprintf(`
listeners:
  - { name: raw, listen: %q, mode: tcp, default: { forward: %q } }
  - name: web
    listen: %q
    mode: http
    routes:
      - { host: [a.test], forward: %q }
      - { host: [dead.test], forward: %q }
      - { host: [never.test], forward: %q }
  - { name: secure, listen: %q, mode: https, certificates: [ { files: { cert: %q, key: %q } } ], default: { forward: %q } }
`, raw, backend(t, echo), web, app, dead, dead, secure, cert, key, app)),
		Options{Missing: map[string]string{"sockmap": "no reason"}})
	is := func(series, want string) {
		t.Helper()
		eventually(t, series+" is "+want, func() bool { return d.scrape(series) == want })
	}
	is(`tailsplice_route_flows{listener="web",route="never.test"}`, "0")
	is(`tailsplice_datapath_on{datapath="sockmap"}`, "0")
	is(`tailsplice_datapath_wanted{datapath="sockmap"}`, "1")
	is(fmt.Sprintf(`tailsplice_certificate_not_after_timestamp_seconds{certificate=%q,listener="secure"}`, cert),
		fmt.Sprint(float64(leaf.Leaf.NotAfter.Unix())))

	conn := dialTCP(t, raw)
	io.WriteString(conn, "hello")
	io.ReadFull(conn, make([]byte, 5))
	for _, series := range []string{`tailsplice_bytes_total{direction="up",listener="raw"}`, `tailsplice_bytes_total{direction="down",listener="raw"}`,
		`tailsplice_route_bytes_total{direction="up",listener="raw",route="default"}`} {
		is(series, "5")
	}
	is(`tailsplice_route_flows{listener="raw",route="default"}`, "1")
	is(`tailsplice_datapath_flows{datapath="userspace"}`, "1")
	d.mu.Lock()
	p := d.plan
	d.mu.Unlock()
	is(fmt.Sprintf(`tailsplice_target_up{target=%q}`, p.Config.Listeners[0].Default.Forward[0].To), "1")
	if got := d.Status().Bytes["up"]; got != 5 {
		t.Errorf("status has %d bytes", got)
	}
	conn.Close()
	is(`tailsplice_route_flows{listener="raw",route="default"}`, "0")
	is(`tailsplice_bytes_total{direction="up",listener="raw"}`, "5")
	is(`tailsplice_route_flow_seconds_count{listener="raw",route="default"}`, "1")

	go func() {
		eventually(t, "bytes of an answer that goes on", func() bool {
			return d.scrape(`tailsplice_route_bytes_total{direction="down",listener="web",route="a.test"}`) == "1000" &&
				d.scrape(`tailsplice_route_flows{listener="web",route="a.test"}`) == "1"
		})
		close(goOn)
	}()
	ask(t, web, "GET", "a.test", "/", nil)
	ask(t, web, "GET", "a.test", "/teapot", nil)
	ask(t, web, "GET", "dead.test", "/", nil)
	ask(t, web, "GET", "nobody.test", "/", nil)
	is(`tailsplice_route_bytes_total{direction="down",listener="web",route="a.test"}`, "1500")
	for _, c := range []struct{ route, code string }{{"a.test", "200"}, {"a.test", "418"}, {"dead.test", "502"}, {"none", "404"}} {
		is(fmt.Sprintf(`tailsplice_route_requests_total{code=%q,listener="web",route=%q}`, c.code, c.route), "1")
	}
	is(`tailsplice_route_request_seconds_count{listener="web",route="a.test"}`, "2")
	is(fmt.Sprintf(`tailsplice_target_up{target=%q}`, dead), "0")
	is(`tailsplice_route_flows{listener="web",route="a.test"}`, "0")

	// A target that no route has any more is not up, and not down either.
	if err := d.Reload(parse(t, fmt.Sprintf(`listeners: [ { name: raw, listen: %q, mode: tcp, default: { forward: %q } } ]`, raw, app))); err != nil {
		t.Fatal(err)
	}
	if got := d.scrape(fmt.Sprintf(`tailsplice_target_up{target=%q}`, dead)); got != "" {
		t.Errorf("a target that is gone is %s", got)
	}
}

// TestManyRoutes measures nothing: it keeps a page with many routes from having more than it says.
func TestManyRoutes(t *testing.T) {
	var routes strings.Builder
	for i := range 1200 {
		fmt.Fprintf(&routes, "      - { sni: [r%d.test], forward: \"127.0.0.1:9\" }\n", i)
	}
	d := start(t, fmt.Sprintf("listeners:\n  - name: web\n    listen: %q\n    mode: sni\n    routes:\n%s", freeAddr(t), routes.String()))
	page := func() string {
		w := httptest.NewRecorder()
		d.Metrics().Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
		return w.Body.String()
	}
	body := page()
	if n := strings.Count(body, "\ntailsplice_route_flows{"); n != 1001 {
		t.Errorf("%d routes are shown, want 1000 and the others as one", n)
	}
	for _, want := range []string{`route="r999.test"`, `route="other"`} {
		if !strings.Contains(body, want) {
			t.Errorf("no %s", want)
		}
	}
	if strings.Contains(body, `route="r1000.test"`) {
		t.Error("the bound does not bound")
	}
}

// TestCountsOfRequests: the body of an upload counts, and what an upgraded connection moves while it lives.
func TestCountsOfRequests(t *testing.T) {
	web := freeAddr(t)
	app := httpBackend(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "" {
			io.Copy(io.Discard, r.Body)
			return
		}
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		io.Copy(conn, rw)
	})
	d := start(t, fmt.Sprintf(`listeners: [ { name: web, listen: %q, mode: http, default: { forward: %q } } ]`, web, app))
	is := func(series, want string) {
		t.Helper()
		series = "tailsplice_route_" + strings.Replace(series, "ROUTE", `listener="web",route="default"`, 1)
		eventually(t, series+" is "+want, func() bool { return d.scrape(series) == want })
	}
	conn := dialTCP(t, web)
	io.WriteString(conn, "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 7\r\n\r\nseven.!")
	is(`bytes_total{direction="up",ROUTE}`, "7")
	is(`flows{ROUTE}`, "0")

	conn = dialTCP(t, web)
	io.WriteString(conn, "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	answer := bufio.NewReader(conn)
	if res, err := http.ReadResponse(answer, nil); err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%+v, %v", res, err)
	}
	io.WriteString(conn, "hello")
	io.ReadFull(answer, make([]byte, 5))
	is(`bytes_total{direction="up",ROUTE}`, "12")
	is(`bytes_total{direction="down",ROUTE}`, "5")
	is(`flows{ROUTE}`, "1")
	conn.Close()
	is(`flows{ROUTE}`, "0")
	is(`requests_total{code="101",ROUTE}`, "1")
}

// TestACMEOfStrangers: names that strangers make up are no series.
func TestACMEOfStrangers(t *testing.T) {
	if !madeUp(acme.Status{OnDemand: true, Problem: "refused"}) || madeUp(acme.Status{Problem: "refused"}) {
		t.Error("what is made up is told from what is not by the wildcard")
	}
	end := time.Unix(1e9, 0)
	var s metrics.State
	for _, a := range []acme.Status{
		{Name: "first.test", State: acme.StateObtaining},
		{Name: "failing.test", State: acme.StateFailing, Problem: "refused"},
		{Name: "valid.test", State: acme.StateValid, NotAfter: end},
		{Name: "renewal-fails.test", State: acme.StateFailing, Problem: "refused", NotAfter: end},
		{Name: "made-up.test", State: acme.StateFailing, Problem: "refused", OnDemand: true},
		{Name: "demanded.test", State: acme.StateFailing, Problem: "refused", OnDemand: true, NotAfter: end},
	} {
		addACME(&s, "web", a)
	}
	want := []metrics.ACME{{Listener: "web", Name: "failing.test"}, {Listener: "web", Name: "valid.test", OK: true},
		{Listener: "web", Name: "renewal-fails.test"}, {Listener: "web", Name: "demanded.test"}}
	if !slices.Equal(s.ACME, want) {
		t.Errorf("%+v, want %+v", s.ACME, want)
	}
	if len(s.Certificates) != 3 {
		t.Errorf("%+v", s.Certificates)
	}
}
