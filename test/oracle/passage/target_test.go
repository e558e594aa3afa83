package passage

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/oracle"
)

// A request is what a target was sent, byte by byte.
type request struct {
	method, target, version string
	fields                  []oracle.Field // of all but the framing
	length                  string         // Content-Length, "" for none
	chunked                 bool
	body                    []byte
	trailer                 []oracle.Field
	whole                   bool // the body came to its end
	id                      string
}

// valuesOf are the values of a field.
func valuesOf(fields []oracle.Field, name string) (all []string) {
	for _, f := range fields {
		if strings.EqualFold(f.Name, name) {
			all = append(all, f.Value)
		}
	}
	return all
}

// A reply is what a target answers.
type reply struct {
	early   bool // before the request's body was read, which never is
	interim []string
	status  int
	fields  []oracle.Field
	body    []byte
	framing int // of the body, see the constants
	trailer []oracle.Field
	cut     int // how many bytes of the body come before the connection is reset; -1 for all
}

// Framings of a reply.
const (
	byLength = iota
	byChunks
	byClose
	framings
)

// bytes is what is sent of the reply to a request with a method.
func (r *reply) bytes(method string) []byte {
	var b bytes.Buffer
	for _, line := range r.interim {
		fmt.Fprintf(&b, "HTTP/1.1 %s\r\n\r\n", line)
	}
	fmt.Fprintf(&b, "HTTP/1.1 %d Reason\r\n", r.status)
	for _, f := range r.fields {
		fmt.Fprintf(&b, "%s: %s\r\n", f.Name, f.Value)
	}
	switch r.framing {
	case byLength:
		fmt.Fprintf(&b, "Content-Length: %d\r\n", len(r.body))
	case byChunks:
		b.WriteString("Transfer-Encoding: chunked\r\n")
	}
	if r.closes() {
		b.WriteString("Connection: close\r\n")
	}
	b.WriteString("\r\n")
	body := r.body
	if r.cut >= 0 {
		body = body[:r.cut]
	}
	switch {
	case r.bodiless(method):
	case r.framing == byChunks:
		if len(body) > 0 {
			fmt.Fprintf(&b, "%x\r\n%s\r\n", len(body), body)
		}
		if r.cut < 0 {
			b.WriteString("0\r\n")
			for _, f := range r.trailer {
				fmt.Fprintf(&b, "%s: %s\r\n", f.Name, f.Value)
			}
			b.WriteString("\r\n")
		}
	default:
		b.Write(body)
	}
	return b.Bytes()
}

// bodiless says whether the reply has no body, whatever its framing says.
func (r *reply) bodiless(method string) bool {
	return method == "HEAD" || r.status == 204 || r.status == 304
}

func (r *reply) closes() bool { return r.framing == byClose || r.early || r.cut >= 0 }

// A target records what it is sent and answers what it is told.
type target struct {
	addr string

	mu   sync.Mutex
	next reply
	id   string   // of the request that is to come
	got  *request // what came of it last
}

func startTarget(t testing.TB) *target {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	g := &target{addr: ln.Addr().String()}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go g.serve(c.(*net.TCPConn))
		}
	}()
	return g
}

// expect makes r the answer to what comes. What has an id, in a header caseHeader, is kept.
func (g *target) expect(r reply, id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.next, g.id, g.got = r, id, nil
}

// caseHeader tells a request from those before it, some of which may be under way still.
const caseHeader = "X-Case"

// seen is what has come since then.
func (g *target) seen() *request {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.got
}

// keep keeps q if it is what is expected.
func (g *target) keep(q *request) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if q.id == g.id {
		g.got = q
	}
}

func (g *target) serve(c *net.TCPConn) {
	defer c.Close()
	br := bufio.NewReader(c)
	for {
		c.SetDeadline(time.Now().Add(time.Minute))
		q, err := readHead(br)
		if err != nil {
			return
		}
		g.mu.Lock()
		r := g.next
		g.mu.Unlock()
		if !r.early {
			q.readBody(br)
		}
		g.keep(q)
		if !r.early && !q.whole {
			return
		}
		if _, err := c.Write(r.bytes(q.method)); err != nil {
			return
		}
		if r.closes() {
			return
		}
	}
}

// readFields reads lines up to the empty one.
func readFields(br *bufio.Reader) (fields []oracle.Field, err error) {
	for {
		line, err := br.ReadString('\n')
		if err != nil {
			return fields, err
		}
		if line == "\r\n" {
			return fields, nil
		}
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\r\n"), ":")
		fields = append(fields, oracle.Field{Name: name, Value: strings.TrimPrefix(value, " ")})
	}
}

func readHead(br *bufio.Reader) (*request, error) {
	line, err := br.ReadString('\n')
	if err != nil {
		return nil, err
	}
	q := &request{}
	var rest string
	q.method, rest, _ = strings.Cut(strings.TrimSuffix(line, "\r\n"), " ")
	if i := strings.LastIndexByte(rest, ' '); i >= 0 {
		q.target, q.version = rest[:i], rest[i+1:]
	}
	fields, err := readFields(br)
	for _, f := range fields {
		switch strings.ToLower(f.Name) {
		case "content-length":
			q.length += f.Value
		case "transfer-encoding":
			q.chunked = f.Value == "chunked"
		case "trailer":
		case "x-case":
			q.id = f.Value
		default:
			q.fields = append(q.fields, f)
		}
	}
	return q, err
}

func (q *request) readBody(br *bufio.Reader) {
	if !q.chunked {
		n, _ := strconv.Atoi(q.length)
		q.body = make([]byte, n)
		n, err := io.ReadFull(br, q.body)
		q.body, q.whole = q.body[:n], err == nil
		return
	}
	for {
		line, err := br.ReadString('\n')
		n, convErr := strconv.ParseUint(strings.TrimSuffix(line, "\r\n"), 16, 32)
		if err != nil || convErr != nil {
			return
		}
		if n == 0 {
			break
		}
		chunk := make([]byte, n+2)
		if _, err := io.ReadFull(br, chunk); err != nil || !bytes.HasSuffix(chunk, []byte("\r\n")) {
			return
		}
		q.body = append(q.body, chunk[:n]...)
	}
	var err error
	q.trailer, err = readFields(br)
	q.whole = err == nil
}
