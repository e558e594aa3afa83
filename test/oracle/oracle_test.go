package oracle

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
)

// TestConn sends messages to a server that knows what is right, by each protocol, on one connection.
func TestConn(t *testing.T) {
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("Trailer", "X-End")
		w.WriteHeader(http.StatusEarlyHints)
		fmt.Fprintf(w, "%s %s %s %q %q %d %q", r.Method, r.RequestURI, r.Host, r.Header["X"],
			r.Trailer["X-Sum"], len(body), r.Header["Trailer"])
		w.Header().Set("X-End", "yes")
	})
	for _, w := range Wires {
		t.Run(w.String(), func(t *testing.T) {
			srv := httptest.NewUnstartedServer(h)
			srv.EnableHTTP2 = true
			srv.Config.Protocols = new(http.Protocols)
			srv.Config.Protocols.SetHTTP1(true)
			srv.Config.Protocols.SetHTTP2(true)
			srv.Config.Protocols.SetUnencryptedHTTP2(true)
			if w.TLS {
				srv.StartTLS()
			} else {
				srv.Start()
			}
			defer srv.Close()
			conf := srv.Client().Transport.(*http.Transport).TLSClientConfig
			if w.TLS {
				conf = conf.Clone()
				conf.ServerName = "example.com"
			}
			c, err := Dial(srv.Listener.Addr().String(), w, conf)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			m := (&Grammar{Hosts: []string{"a.test"}, Paths: []string{"/p"}}).Plain()
			for _, tt := range []struct {
				change func()
				want   string
			}{
				{func() {}, `GET /p a.test [] [] 0 []`},
				{func() { m.Fields = []Field{{"X", "1"}, {"X", "2"}} }, `GET /p a.test ["1" "2"] [] 0 []`},
				{func() { m.Method, m.Body = "POST", bytes.Repeat([]byte("x"), 40_000) },
					`POST /p a.test ["1" "2"] [] 40000 []`},
				{func() { m.Split, m.Padding, m.Priority = []int{1, 1, 100}, 9, true },
					`POST /p a.test ["1" "2"] [] 40000 []`},
				{func() { m.Chunked, m.Trailer = true, []Field{{"X-Sum", "s"}} },
					`POST /p a.test ["1" "2"] ["s"] 40000 []`},
				{func() { m.Body = []byte{} }, `POST /p a.test ["1" "2"] ["s"] 0 []`},
			} {
				tt.change()
				a := c.Do(m)
				if a.Status != 200 || string(a.Body) != tt.want || a.Cut != nil ||
					a.Trailer.Get("X-End") != "yes" || len(a.Interim) == 0 || !c.Usable() ||
					!bytes.Contains(c.Seen, []byte(tt.want)) {
					t.Fatalf("%+v, %q, usable: %v; want %q", a, a.Body, c.Usable(), tt.want)
				}
			}
			m.Hosts = append(m.Hosts, "b.test") // what the server refuses
			if a := c.Do(m); !w.HTTP2 && a.Status != 400 {
				t.Errorf("two hosts: %+v", a)
			}
		})
	}
}

// TestGrammar makes many messages: without choices it is the plain one, the same choices make the same, and
// most of what is right is among them, with what is wrong.
func TestGrammar(t *testing.T) {
	seeds, err := AllSeeds()
	if err != nil {
		t.Fatal(err)
	}
	g := &Grammar{Hosts: []string{"a.test", "b.test"}, Paths: []string{"/", "/x"}, Names: []string{"X-One"},
		Values: []string{"1"}, Seeds: seeds}
	if got, want := g.Message(FromBytes(nil)).String(), g.Plain().String(); got != want {
		t.Errorf("without choices it is %s, want %s", got, want)
	}
	parsed := 0
	for i := range uint64(2000) {
		m, again := g.Message(Random(i)), g.Message(Random(i))
		if m.String() != again.String() {
			t.Fatalf("%d is %s, and then %s", i, m, again)
		}
		if _, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(m.HTTP1()))); err == nil {
			parsed++
		}
	}
	if parsed < 600 || parsed > 1800 {
		t.Errorf("net/http takes %d of 2000", parsed)
	}
}
