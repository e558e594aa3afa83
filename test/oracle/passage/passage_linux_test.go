// Package passage sends requests through the daemon to a target that records every byte, and answers whatever
// it is told. What arrives at either end is what the other sent, or table_test.go says what may differ.
// Beside it nginx gets the same requests.
//
// go test ./test/oracle/passage -run TestPassage -executions 1000000 makes many more exchanges than usual,
// and
// -fuzz FuzzPassage goes on. TAILSPLICE_BINARY names another binary of the daemon, an old one say.
package passage

import (
	"cmp"
	"crypto/tls"
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http/httpguts"

	"github.com/tailsplice/tailsplice/test/oracle"
)

var (
	executions = flag.Int("executions", 0, "how many exchanges TestPassage makes; 0 for the usual number")
	seed       = flag.Uint64("seed", 0, "the first of the numbers that they are made of; 0 for a random one")
)

// What messages are made of, and what is wrong in them now and then.
var (
	// That a | needs an escape is no reason to lose those of others.
	pieces = []string{"a", "b", "/", "/", "%2F", "%2f", "%20", "%7C", "|", "{", "}", "\"", "^", "\\", "`",
		"<", ">", "\x80",
		"\xc3\xa9", "%C3%A9", "%25", "..", ".", "//", "%2e", "?", "&", "=", ";", "+", "~", "!", "$", "'",
		"(", ")", "*", ",",
		":", "@", "[", "]"}
	oddPieces = []string{"%", "%00", "%zz", "#", " ", "\x7f", "\x00"}
	hosts     = []string{"a.test", "a.test", "b.test:8080", "A.Test", "a.test.", "127.0.0.1", "[::1]:80",
		"under_score.test", "x.y.z"}
	oddHosts = []string{"a.test:80:80", "me@a.test", "a..test", "a.test:0", "", "[a.test]", "a test"}
	methods  = []string{"GET", "GET", "POST", "PUT", "HEAD", "DELETE", "OPTIONS", "PATCH", "PROPFIND",
		"M-SEARCH", "get", "X", "TRACE"}
	oddMethod = []string{"CONNECT", "G(T", "PRI", ""}
	names     = []string{"X-One", "x-two", "X-THREE", "X_Four", "X.Five", "Accept", "Accept-Encoding",
		"Cookie", "Cookie", "Referer",
		"If-None-Match", "Range", "Authorization", "Content-Type", "User-Agent", "Via", "Cache-Control",
		"Pragma", "Origin",
		"Date", "DNT", "~odd!", "Content-Encoding", "Content-Language", "X-Requested-With",
		"sec-fetch-mode", "Max-Forwards",
		"Sec-WebSocket-Key", "Sec-WebSocket-Protocol", "ETag", "Upgrade-Insecure-Requests",
		"Accept-Charset", "Warning", "Link"}
	oddNames = []string{"TE", "Keep-Alive", "Proxy-Authorization", "Proxy-Connection", "Expect", "Sp ace",
		"N\x01", "Caf\xe9"}
	texts = []string{"1", "a, b", `"q;,\"x"`, "", "caf\xe9", "caf\xc3\xa9", "a\tb", "  padded \t",
		"%2F|{}", "gzip", "k=v",
		"k=v; l=w", "*", "=?utf-8?q?x?=", "0", "bytes=0-1"}
	oddTexts = []string{"a\x01b", "a\x7fb", "100-continue", "trailers"}
)

// pick chooses from a list, and now and then from an odd one.
func pick(c *oracle.Choices, usual, odd []string) string {
	if c.Percent(3) {
		return oracle.Pick(c, odd...)
	}
	return oracle.Pick(c, usual...)
}

func path(c *oracle.Choices) string {
	p := "/"
	for range c.Int(8) {
		p += pick(c, pieces, oddPieces)
	}
	return p
}

func fields(c *oracle.Choices, most int) (all []oracle.Field) {
	for range c.Int(most + 1) {
		f := oracle.Field{Name: pick(c, names, oddNames), Value: pick(c, texts, oddTexts)}
		if f.Name == "Expect" || f.Name == "TE" {
			f.Value = oracle.Pick(c, "100-continue", "trailers", "x")
		}
		if c.Percent(3) {
			f.Value = strings.Repeat("v", 1<<c.Int(14))
		}
		all = append(all, f)
	}
	return all
}

func content(c *oracle.Choices) []byte {
	b := make([]byte, oracle.Pick(c, 0, 1, 5, 100, 4096, 20_000, 50_000))
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	return b
}

// anExchange makes an exchange. Without choices nothing is odd in it.
func anExchange(c *oracle.Choices) *exchange {
	x := &exchange{wire: oracle.Pick(c, oracle.Wires...), reply: reply{status: 200, body: []byte("hello"),
		cut: -1}}
	m := &oracle.Message{Method: pick(c, methods, oddMethod), Target: path(c), Hosts: []string{pick(c, hosts,
		oddHosts)}}
	x.message = m
	if c.Percent(10) {
		m.Target = pick(c, []string{"http://", "HTTPS://"}, []string{"ftp://", "http:", "x:http://", ""}) +
			m.Hosts[0] + m.Target
	}
	if c.Percent(2) {
		m.Target = oracle.Pick(c, "*", "", "443", "a.test:443", "admin", "?x")
	}
	if c.Percent(2) {
		m.Hosts = oracle.Pick(c, nil, []string{"a.test", "a.test"}, []string{"a.test", "b.test"})
	}
	m.Fields = fields(c, 6)
	if !x.wire.HTTP2 && c.Percent(20) || c.Percent(1) {
		m.Fields = append(m.Fields, oracle.Field{Name: "Connection", Value: oracle.Pick(c, "close",
			"keep-alive", "X-One", "x-two, TE", "X-One, close")})
	}
	if c.Percent(40) {
		m.Body, m.Chunked = content(c), c.Percent(50)
		if m.Chunked && len(m.Body) > 0 && c.Percent(50) {
			m.Trailer = fields(c, 3)
		}
	}
	if c.Percent(10) && !x.wire.HTTP2 {
		m.Version = "HTTP/1.0"
		if m.Chunked {
			m.Chunked, m.Trailer = false, nil // which HTTP/1.0 has not
		}
	}
	if x.wire.HTTP2 && c.Percent(20) {
		m.Split, m.Padding, m.Priority = []int{c.Int(256), c.Int(256)}, byte(c.Int(64)), c.Percent(50)
	}

	r := &x.reply
	r.status = oracle.Pick(c, 200, 200, 200, 201, 204, 206, 302, 304, 401, 404, 413, 418, 500, 502, 503, 599,
		999)
	for _, f := range fields(c, 5) {
		if x.replyMayHave(f) {
			r.fields = append(r.fields, f)
		}
	}
	if c.Percent(10) {
		r.fields = append(r.fields, oracle.Field{Name: oracle.Pick(c, "Set-Cookie", "Alt-Svc", "Server",
			"Location", "Strict-Transport-Security", "WWW-Authenticate", "Vary"), Value: "a=b"},
			oracle.Field{Name: "Set-Cookie", Value: "c=d"})
	}
	r.body, r.framing = content(c), c.Int(framings)
	if c.Percent(10) {
		for range 1 + c.Int(2) {
			r.interim = append(r.interim, oracle.Pick(c, "103 Early Hints", "102 Processing"))
		}
	}
	if r.framing == byChunks && c.Percent(50) {
		r.trailer = []oracle.Field{{Name: oracle.Pick(c, "X-Sum", "x-late", "ETag"), Value: oracle.Pick(c,
			"1", "a, b", "")}}
	}
	if r.framing != byClose && !r.bodiless(m.Method) && c.Percent(10) {
		r.cut = c.Int(len(r.body) + 1)
	}
	if r.framing != byClose && len(m.Body) > 0 && c.Percent(10) {
		r.early = true
	}
	return x
}

// replyMayHave says whether net/http reads an answer with a field. What it does not read is 502, and another
// test's.
func (x *exchange) replyMayHave(f oracle.Field) bool {
	return httpguts.ValidHeaderFieldName(f.Name) && httpguts.ValidHeaderFieldValue(f.Value)
}

// A passage is what exchanges go through: the daemon, before a target of its own. It is for one goroutine.
type passage struct {
	doors  map[oracle.Wire]string
	target *target
	conns  map[oracle.Wire]*oracle.Conn
	sent   int
}

func (p *passage) close() {
	for _, c := range p.conns {
		c.Close()
	}
}

// send makes an exchange and returns what the target got last, nil for nothing, and what the client got.
func (p *passage) send(x *exchange) (q *request, a oracle.Answer, err error) {
	c := p.conns[x.wire]
	if c == nil || !c.Usable() {
		if c != nil {
			c.Close()
			delete(p.conns, x.wire)
		}
		if c, err = oracle.Dial(p.doors[x.wire], x.wire, &tls.Config{InsecureSkipVerify: true,
			ServerName: "a.test"}); err != nil {
			return nil, a, err
		}
		c.Patience = time.Minute
		p.conns[x.wire] = c
	}
	p.sent++
	m, id := *x.message, fmt.Sprint(p.sent)
	m.Fields = append(slices.Clip(m.Fields), oracle.Field{Name: caseHeader, Value: id})
	p.target.expect(x.reply, id)
	a = c.Do(&m)
	q = p.target.seen()
	if x.reply.early || q == nil || !q.whole {
		// Go's HTTP/2 takes trailers that come late for a stream for an error of the connection.
		c.Close()
		delete(p.conns, x.wire)
	}
	return q, a, nil
}

// try makes an exchange and says what is wrong with it, "" if nothing is.
func (p *passage) try(x *exchange) (string, *request) {
	q, a, err := p.send(x)
	if err != nil {
		return err.Error(), nil
	}
	why := x.refusal()
	refused := a.Status == 0 || a.Status == 400 || a.Status == 405 || a.Status == 417
	if len(x.message.Trailer) > 0 && x.reply.early && a.Cut != nil {
		refused = true // for its trailers, which came when the answer had begun
	}
	if why != "" && refused {
		return "", nil // of what is wrong at the end of a body the target has got some
	}
	if q == nil {
		return fmt.Sprintf("the target gets nothing: %d %.100q, %v; %s", a.Status, a.Body, a.Cut, why), nil
	}
	return x.arrived(q) + x.cameBack(a), q
}

// shrink looks for the least of what is wrong.
func (p *passage) shrink(x *exchange) *exchange {
	for again := true; again; {
		again = false
		for i := range 16 + len(x.message.Fields) + len(x.reply.fields) {
			less, m := *x, *x.message
			less.message = &m
			switch n := i - 16; {
			case n >= len(m.Fields):
				n -= len(m.Fields)
				less.reply.fields = slices.Delete(slices.Clone(x.reply.fields), n, n+1)
			case n >= 0:
				m.Fields = slices.Delete(slices.Clone(m.Fields), n, n+1)
			case i == 0:
				m.Body, m.Chunked, m.Trailer = nil, false, nil
			case i == 1:
				m.Trailer = nil
			case i == 2:
				less.reply = reply{status: 200, cut: -1}
			case i == 3:
				less.reply.early = false
			case i == 4:
				less.reply.cut = -1
			case i == 5:
				less.reply.interim, less.reply.trailer = nil, nil
			case i == 6:
				less.reply.status = 200
			case i == 7:
				m.Method = "POST"
			case i == 8:
				m.Hosts = []string{"a.test"}
			case i == 9:
				m.Version = ""
			case i == 10:
				less.wire = oracle.Wire{}
			case i == 11:
				m.Split, m.Padding, m.Priority = nil, 0, false
			default: // a piece of the path
				if len(m.Target) < 2 {
					continue
				}
				at := 1 + (i-12)*(len(m.Target)-1)/4
				m.Target = m.Target[:at] + m.Target[min(len(m.Target), at+1+len(m.Target)/8):]
			}
			if fmt.Sprint(less.String(), less.reply) == fmt.Sprint(x.String(), x.reply) {
				continue
			}
			if wrong, _ := p.try(&less); wrong != "" {
				x, again = &less, true
				break
			}
		}
	}
	return x
}

// known are doors that were open once: bytes that changed on the way, and answers that were lost.
func known() (all []*exchange) {
	for _, wire := range oracle.Wires {
		add := func(m oracle.Message, r reply) {
			if m.Method == "" {
				m.Method = "GET"
			}
			m.Target, m.Hosts = cmp.Or(m.Target, "/"), []string{"a.test"}
			all = append(all, &exchange{wire: wire, message: &m, reply: r})
		}
		hi := reply{status: 200, body: []byte("hi"), cut: -1}
		for _, target := range []string{"/a%2Fb|c", "/a%2fb{}^\"`\\", "/caf\xc3\xa9%2F", "/?a;b=%zz&c??",
			"//a|%7C", "///{%2e\\%2F\x80%25"} {
			add(oracle.Message{Target: target}, hi)
		}
		add(oracle.Message{Fields: []oracle.Field{{Name: "Sec-WebSocket-Key", Value: "x"}}}, hi)
		add(oracle.Message{}, reply{status: 204, body: []byte("hello"), cut: -1})
		add(oracle.Message{}, reply{status: 200, body: []byte("hello"), cut: 2})
		add(oracle.Message{}, reply{status: 200, framing: byChunks, body: []byte("hello"), cut: 2})
		add(oracle.Message{}, reply{status: 200, fields: []oracle.Field{{Name: "Alt-Svc",
			Value: `h3=":443"`}}, cut: -1})
		add(oracle.Message{Method: "POST", Body: make([]byte, 50_000)}, reply{status: 401, early: true,
			cut: -1})
		add(oracle.Message{Method: "POST", Body: []byte("x"), Chunked: true,
			Trailer: []oracle.Field{{Name: "X Sum", Value: "1"}}}, hi)
		if !wire.HTTP2 {
			add(oracle.Message{Version: "HTTP/1.0"}, reply{status: 200, interim: []string{"103 Early Hints"},
				cut: -1})
			add(oracle.Message{Version: "HTTP/1.0"}, reply{status: 200, framing: byChunks,
				body: []byte("hello"), cut: 2})
		}
	}
	return all
}

// TestPassage makes exchanges that are known and random ones exchanges through the daemon, and sends the
// requests of some through nginx too.
func TestPassage(t *testing.T) {
	n, first := 8000, *seed
	if *executions > 0 {
		n = *executions
	}
	if first == 0 {
		first = rand.Uint64()
	}
	t.Logf("-executions %d -seed %d", n, first)
	workers := min(4, runtime.GOMAXPROCS(0))
	ours, theirs := startDaemon(t, workers), startNginx(t, workers)
	began := time.Now()
	for _, x := range known() {
		if wrong, _ := ours[0].try(x); wrong != "" {
			t.Errorf("known: %s: %s", x, wrong)
		}
	}
	var next, refused atomic.Int64
	var mu sync.Mutex
	found := map[string]int{}
	var wg sync.WaitGroup
	for i := range workers {
		wg.Go(func() {
			defer ours[i].close()
			defer theirs[i].close()
			for {
				i2 := next.Add(1) - 1
				if i2 >= int64(n) {
					return
				}
				x := anExchange(oracle.Random(first + uint64(i2)))
				wrong, got := ours[i].try(x)
				if wrong == "" && got == nil {
					refused.Add(1)
				}
				least := x
				if wrong != "" {
					least = ours[i].shrink(x)
					if again, _ := ours[i].try(least); again != "" {
						wrong = again
					} else {
						wrong = "once: " + wrong
					}
				} else if !x.wire.TLS && i2%2 == 0 {
					wrong = x.beside(got, theirs[i])
				}
				if wrong == "" {
					continue
				}
				mu.Lock()
				kind, _, _ := strings.Cut(wrong, " is ")
				found[kind]++
				tell := found[kind] == 1 && len(found) <= 20
				mu.Unlock()
				if tell {
					t.Errorf("after %.1f s, seed %d: %s: %s", time.Since(began).Seconds(), first+uint64(i2),
						least, wrong)
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d exchanges, %d refused, wrong: %v, in %.1f s", n, refused.Load(), found,
		time.Since(began).Seconds())
	if n > 1000 && (refused.Load() < int64(n)/20 || refused.Load() > int64(n)*3/4) {
		t.Errorf("%d of %d requests were refused: most should pass, and some not", refused.Load(), n)
	}
}

// FuzzPassage makes exchanges of a fuzzer's bytes.
func FuzzPassage(f *testing.F) {
	f.Add([]byte(nil))
	p := startDaemon(f, 1)[0]
	f.Fuzz(func(t *testing.T, b []byte) {
		x := anExchange(oracle.FromBytes(b))
		if wrong, _ := p.try(x); wrong != "" {
			t.Errorf("%s: %s", x, wrong)
		}
	})
}
