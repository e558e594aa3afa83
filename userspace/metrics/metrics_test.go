package metrics

import (
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func scrape(s *Set) string {
	rec := httptest.NewRecorder()
	s.Handler().ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
	return rec.Body.String()
}

func TestHandlerAndTotals(t *testing.T) {
	state := State{Flows: 3, Datapaths: []Datapath{{Name: "sockmap", On: true, Stalls: 4}},
		Traffic:      []Traffic{{"web", "", 0, 7, 8}, {"web", "*.test", 2, 5, 6}},
		Certificates: []Certificate{{"web", "a.pem", time.Unix(1e9, 0)}}, Targets: []Target{{"a:1", true, 5, map[string]int64{"ok": 7, "failed": 0}}, {"b:1", false, 0, nil}},
		ACME: []ACME{{"web", "a.test", false}}, Problems: map[string]int{"address": 1}}
	s := New("v1", func() State { return state })
	s.Refused.WithLabelValues("web", "hello_timeout").Add(2)
	s.Refused.WithLabelValues("api", "hello_timeout").Inc()
	s.Refused.WithLabelValues("web", "not_tls").Inc()
	s.RouteRequests.WithLabelValues("web", "*.test", Code(503)).Inc()
	if got := Totals(s.Refused, "reason"); got["hello_timeout"] != 3 || got["not_tls"] != 1 || len(got) != 2 {
		t.Errorf("totals by reason: %v", got)
	}
	if got := Totals(s.Refused, "listener"); got["web"] != 3 || got["api"] != 1 {
		t.Errorf("totals by listener: %v", got)
	}
	body := scrape(s)
	for _, want := range []string{`tailsplice_flows 3`, `tailsplice_build_info{version="v1"} 1`,
		`tailsplice_datapath_stalls_total{datapath="sockmap"} 4`, `tailsplice_datapath_on{datapath="sockmap"} 1`,
		`tailsplice_bytes_total{direction="up",listener="web"} 7`, `tailsplice_route_flows{listener="web",route="*.test"} 2`,
		`tailsplice_route_bytes_total{direction="down",listener="web",route="*.test"} 6`,
		`tailsplice_route_requests_total{code="503",listener="web",route="*.test"} 1`,
		`tailsplice_target_up{target="a:1"} 1`, `tailsplice_target_up{target="b:1"} 0`, `tailsplice_target_connections_total{target="a:1"} 5`, `tailsplice_health_checks_total{result="ok",target="a:1"} 7`, `tailsplice_acme_ok{listener="web",name="a.test"} 0`,
		`tailsplice_certificate_not_after_timestamp_seconds{certificate="a.pem",listener="web"} 1e+09`, `tailsplice_problems{part="address"} 1`,
		`tailsplice_connections_refused_total{listener="web",reason="not_tls"} 1`} {
		if !strings.Contains(body, want+"\n") {
			t.Errorf("no %q in\n%s", want, body)
		}
	}
	state.Datapaths[0].On = false
	state.Certificates = append(state.Certificates, Certificate{"web", "x\xff", time.Unix(1, 0)}, state.Certificates[0])
	s.DropRoute("web", "*.test")
	body = scrape(s)
	if want := `tailsplice_datapath_on{datapath="sockmap"} 0`; !strings.Contains(body, want) {
		t.Errorf("no %q in\n%s", want, body)
	}
	if !strings.Contains(body, "x\ufffd") {
		t.Error("a certificate whose file is not UTF-8 is not shown")
	}
	if strings.Contains(body, `code="503"`) {
		t.Error("a route that was dropped is still shown")
	}
}

// TestCode: whoever answers chooses the status, and has no say in how many series there are.
func TestCode(t *testing.T) {
	codes := map[string]bool{}
	for status := range 1000 {
		codes[Code(status)] = true
	}
	if len(codes) > 70 || !codes["other"] || !codes["499"] || !codes["502"] || codes["599"] {
		t.Errorf("%d codes: %v", len(codes), codes)
	}
}
