package vhost

import (
	"bytes"
	"cmp"
	_ "embed"
	"encoding/json"
	"fmt"
	"html/template"
	"math"
	"mime"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

//go:embed page.html
var pageHTML string

var pageTemplate = template.Must(template.New("page").Parse(pageHTML))

// formatVersion is raised as flow.FormatVersion is, whose value it has.
const formatVersion = 1

// errorPage is a page for programs.
type errorPage struct {
	Format int      `json:"format_version"`
	Status int      `json:"status"`
	Error  string   `json:"error"`
	Detail string   `json:"detail"`
	Hint   string   `json:"hint,omitempty"`
	Passed []string `json:"passed,omitempty"` // the hops before Node
	Node   string   `json:"node"`
	Target string   `json:"target,omitempty"`
	Reason string   `json:"reason,omitempty"`
	ID     string   `json:"id,omitempty"`
}

// page answers with a page of this hop's own, in the form that the client reads.
func (s *Server) page(x *exchange, status int, f fault) {
	if strings.HasPrefix(x.req.Header.Get("Content-Type"), "application/grpc") { // gRPC and gRPC-Web
		s.grpcPage(x, status, f)
		return
	}
	var buf bytes.Buffer
	way := s.stops(x, f)
	kind := "text/plain; charset=utf-8"
	switch preferred(x.req) {
	case "html":
		kind = "text/html; charset=utf-8"
		err := pageTemplate.Execute(&buf, map[string]any{"Status": status, "StatusText": http.StatusText(status),
			"Title": f.title, "Text": f.text, "Hint": f.hint, "Node": s.opts.Node, "Path": way, "ID": x.id})
		if err != nil {
			s.log.Error("http: making a page failed", "err", err)
		}
	case "json":
		kind = "application/json"
		enc := json.NewEncoder(&buf)
		enc.SetEscapeHTML(false)
		enc.Encode(errorPage{formatVersion, status, f.title, f.text, f.hint, x.passed(), s.opts.Node, bare(f.target), f.reason, x.id})
	default:
		fmt.Fprintf(&buf, "%d %s: %s\n\n%s\n", status, http.StatusText(status), f.title, f.text)
		if f.hint != "" {
			fmt.Fprintln(&buf, f.hint)
		}
		fmt.Fprintln(&buf)
		for i, p := range way {
			switch {
			case i == 0:
				fmt.Fprint(&buf, "path: ", p.Name)
			case p.Failed:
				fmt.Fprintf(&buf, " -x- %s (%s)\n", p.Name, p.State)
			default:
				fmt.Fprint(&buf, " -> ", p.Name)
			}
		}
		if x.id != "" {
			fmt.Fprintf(&buf, "id:   %s\n", x.id)
		}
	}
	h := x.resp.Header()
	h.Set("Content-Type", kind)
	h.Set("Content-Length", strconv.Itoa(buf.Len()))
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'self'")
	if x.id != "" {
		h[IDHeader] = []string{x.id}
	}
	x.resp.WriteHeader(status)
	x.resp.Write(buf.Bytes()) // for HEAD net/http sends the header alone
}

// preferred is the page that a client wants most: html, json, or, for programs that accept anything, text.
func preferred(r *http.Request) string {
	best, bestQ := "text", 0.0
	for _, line := range r.Header["Accept"] {
		for part := range strings.SplitSeq(line, ",") {
			kind, params, err := mime.ParseMediaType(part)
			if err != nil {
				continue
			}
			q := 1.0
			if v, err := strconv.ParseFloat(params["q"], 64); err == nil {
				q = v
			}
			form := ""
			switch {
			case kind == "text/html", kind == "application/xhtml+xml":
				form = "html"
			case kind == "application/json", strings.HasSuffix(kind, "+json"):
				form = "json"
			case kind == "text/plain":
				form = "text"
			}
			if form != "" && q > bestQ {
				best, bestQ = form, q
			}
		}
	}
	agent, _, _ := strings.Cut(strings.ToLower(r.UserAgent()), "/")
	if best == "html" && slices.Contains([]string{"curl", "wget", "httpie", "xh"}, agent) {
		// people read what it gets
		return "text"
	}
	return best
}

// gRPC's status codes (google.golang.org/grpc/codes), and those that its clients make of HTTP's.
const (
	grpcUnknown          = 2
	grpcDeadlineExceeded = 4
)

var grpcCodes = map[int]int{
	http.StatusBadRequest:         13, // INTERNAL
	http.StatusUnauthorized:       16, // UNAUTHENTICATED
	http.StatusForbidden:          7,  // PERMISSION_DENIED
	http.StatusNotFound:           12, // UNIMPLEMENTED
	http.StatusTooManyRequests:    14, // UNAVAILABLE
	http.StatusBadGateway:         14,
	http.StatusServiceUnavailable: 14,
	http.StatusGatewayTimeout:     14,
}

// grpcPage is a page for a program: the answer without a body that gRPC calls Trailers-Only. Clients would
// make the same code of a page's status, but for a deadline, and not see a word of it.
func (s *Server) grpcPage(x *exchange, status int, f fault) {
	code := cmp.Or(grpcCodes[status], grpcUnknown)
	// A server ends a call when its deadline is over, and may be quicker than its client.
	if d, ok := grpcTimeout(x.req.Header.Get("Grpc-Timeout")); ok && time.Since(x.started) >= d {
		code = grpcDeadlineExceeded
	}
	h := x.resp.Header()
	h.Set("Content-Type", x.req.Header.Get("Content-Type"))
	h.Set("Grpc-Status", strconv.Itoa(code))
	h.Set("Grpc-Message", grpcMessage(fmt.Sprintf("%s: %s (%d from %s)", f.title, f.text, status, s.opts.Node)))
	if x.id != "" {
		h[IDHeader] = []string{x.id}
	}
	x.resp.WriteHeader(http.StatusOK)
}

// grpcTimeout reads the header Grpc-Timeout: up to eight digits and a unit.
func grpcTimeout(v string) (time.Duration, bool) {
	if len(v) < 2 || len(v) > 9 {
		return 0, false
	}
	units := map[byte]time.Duration{'H': time.Hour, 'M': time.Minute, 'S': time.Second, 'm': time.Millisecond, 'u': time.Microsecond, 'n': time.Nanosecond}
	unit, ok := units[v[len(v)-1]]
	n, err := strconv.ParseUint(v[:len(v)-1], 10, 32)
	if !ok || err != nil {
		return 0, false
	}
	return time.Duration(min(n, uint64(math.MaxInt64/unit))) * unit, true
}

// grpcMessage writes a text as Grpc-Message has it: percent-encoded where it is not printable ASCII.
func grpcMessage(text string) string {
	return escapeBytes(text, func(c byte) bool { return c < ' ' || c > '~' || c == '%' })
}
