package vhost

import (
	"cmp"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"time"
)

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
