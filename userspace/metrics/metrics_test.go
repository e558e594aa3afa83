package metrics

import (
	"io"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestHandlerAndTotals(t *testing.T) {
	s := New("v1", func() int { return 3 })
	s.Refused.WithLabelValues("web", "hello_timeout").Add(2)
	s.Refused.WithLabelValues("api", "hello_timeout").Inc()
	s.Refused.WithLabelValues("web", "not_tls").Inc()
	if got := Totals(s.Refused, "reason"); got["hello_timeout"] != 3 || got["not_tls"] != 1 || len(got) != 2 {
		t.Errorf("totals by reason: %v", got)
	}
	if got := Totals(s.Refused, "listener"); got["web"] != 3 || got["api"] != 1 {
		t.Errorf("totals by listener: %v", got)
	}
	off := ""
	s.Watch("sockmap", func() (string, uint64) { return off, 4 })
	rec := httptest.NewRecorder()
	s.Handler().ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
	body, _ := io.ReadAll(rec.Body)
	for _, want := range []string{`tailsplice_flows 3`, `tailsplice_build_info{version="v1"} 1`,
		`tailsplice_datapath_stalls_total{datapath="sockmap"} 4`, `tailsplice_datapath_on{datapath="sockmap"} 1`,
		`tailsplice_connections_refused_total{listener="web",reason="not_tls"} 1`} {
		if !strings.Contains(string(body), want) {
			t.Errorf("no %q in\n%s", want, body)
		}
	}
	off = "it failed"
	rec = httptest.NewRecorder()
	s.Handler().ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
	if want := `tailsplice_datapath_on{datapath="sockmap"} 0`; !strings.Contains(rec.Body.String(), want) {
		t.Errorf("no %q in\n%s", want, rec.Body)
	}
}
