package sockmap

import (
	"io"
	"net"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/loader/loadertest"
)

// BenchmarkChangeOfHands measures a flow's way into the sockmap and back out, with different traffic
// meanwhile.
func BenchmarkChangeOfHands(b *testing.B) {
	for _, c := range []struct {
		name    string
		traffic func(client, server *net.TCPConn)
	}{
		{"idle", func(_, _ *net.TCPConn) {}},
		{"ping-pong", func(client, server *net.TCPConn) {
			go func() { _, _ = io.Copy(struct{ io.Writer }{server}, struct{ io.Reader }{server}) }()
			for buf := make([]byte, 64); ; {
				if _, err := client.Write(buf); err != nil {
					return
				}
				if _, err := io.ReadFull(client, buf); err != nil {
					return
				}
			}
		}},
		{"bulk", func(client, server *net.TCPConn) {
			go func() { _, _ = io.Copy(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{server}) }()
			for buf := make([]byte, 64<<10); ; {
				if _, err := client.Write(buf); err != nil {
					return
				}
			}
		}},
	} {
		b.Run(c.name, func(b *testing.B) {
			l := open(b, nil, 16)
			client, d := loadertest.Connect(b, "tcp4")
			u, server := loadertest.Connect(b, "tcp4")
			var fds [2]int
			for i, conn := range []*net.TCPConn{d, u} {
				s, err := dup(conn)
				if err != nil {
					b.Fatal(err)
				}
				conn.Close()
				fds[i] = int(s)
			}
			type rests struct{ down, up []byte }
			back := make(chan rests, 1)
			o := Flow{ID: "hands", Buffer: 2 << 20, Busy: 1 << 40, Returned: func(_, _ int, down, up []byte, _, _ int64, _ time.Time, _ func(), _ error) {
				back <- rests{down, up}
			}}
			go c.traffic(client, server)
			var in, out time.Duration
			written := 0
			for b.Loop() {
				begin := time.Now()
				if _, err := l.Splice(b.Context(), fds[0], fds[1], o); err != nil {
					b.Fatal(err)
				}
				taken := time.Now()
				time.Sleep(time.Millisecond) // of traffic
				left := time.Now()
				var r rests
				for done := false; !done; {
					leave(l)
					select {
					case r = <-back:
						done = true
					case <-time.After(time.Millisecond):
					}
				}
				in, out = in+taken.Sub(begin), out+time.Since(left)
				for i, rest := range [][]byte{r.down, r.up} {
					for written += len(rest); len(rest) > 0; {
						n, _ := socket(fds[1-i]).write(rest)
						rest = rest[n:]
					}
				}
			}
			b.ReportMetric(float64(in.Microseconds())/float64(b.N), "us-in/op")
			b.ReportMetric(float64(out.Microseconds())/float64(b.N), "us-out/op")
			b.ReportMetric(float64(written)/float64(b.N), "rest-B/op")
			client.Close()
			server.Close()
			for _, fd := range fds {
				socket(fd).close()
			}
		})
	}
}

// The walk to a flow that leaves goes no further than to its sockets.
func TestWalkGoesNoFurther(t *testing.T) {
	l := open(t, nil, 16)
	loadertest.SplicePath(t, l, loadertest.PathOptions{Busy: 1 << 40})
	f := l.onlyFlow(t)
	detachOne(t, l, f, 0)
	v := l.detacher
	loadertest.WaitFor(t, func() bool {
		v.mu.Lock()
		defer v.mu.Unlock()
		return !f.directions[0].wasAsked
	}, "the walk to end")
	var last sockmapLeaveCall
	if loadertest.Must(t, v.call.Get(&last)); last.Half == ^uint32(0) {
		t.Error("it went to the end")
	}
}
