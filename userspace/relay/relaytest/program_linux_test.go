package relaytest

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/relay"
)

// A program is the same after it was printed and read, and no step waits for one that waits for it: neither
// as it was made up nor when something is left out.
func TestRandomProgram(t *testing.T) {
	for i := range uint64(2000) {
		p := RandomProgram(7, i)
		if again := RandomProgram(7, i); again.String() != p.String() {
			t.Fatalf("%q, and then %q", p, again)
		}
		if again, err := ParseProgram(p.String()); err != nil || again.String() != p.String() {
			t.Fatalf("%q is read as %q: %v", p, again, err)
		}
		runsToEnd(t, p)
		for j := range len(p.Client) + len(p.Server) {
			for n := 1; j+n <= len(p.Client)+len(p.Server); n++ {
				short := without(p, j, n)
				if len(short.Client)+len(short.Server) > len(p.Client)+len(p.Server)-n {
					t.Fatalf("%q without %d steps from %d: %q", p, n, j, short)
				}
				runsToEnd(t, short)
			}
		}
	}
}

// runsToEnd runs the waits of p.
func runsToEnd(t *testing.T, p Program) {
	t.Helper()
	c, s := 0, 0
	ready := func(ops []Op, own, other, others int) bool {
		return own < len(ops) && (ops[own].Do != opWait || int(ops[own].N) <= other || other == others)
	}
	for moved := true; moved; {
		moved = false
		if ready(p.Client, c, s, len(p.Server)) {
			c, moved = c+1, true
		}
		if ready(p.Server, s, c, len(p.Client)) {
			s, moved = s+1, true
		}
	}
	if c < len(p.Client) || s < len(p.Server) {
		t.Fatalf("%q stands still after %d and %d steps", p, c, s)
	}
}

func TestParseProgram(t *testing.T) {
	for _, s := range []string{
		"", "client: write 1", "client: write / server:", "client: end 1 / server:", "server: / client:",
		"client: end,, end / server:",
	} {
		if p, err := ParseProgram(s); err == nil {
			t.Errorf("%q is read as %q", s, p)
		}
	}
}

func TestShrink(t *testing.T) {
	p, err := ParseProgram("client: stop 5, write 100, wait 2, write 125000, acked, end / " +
		"server: pause 1, urgent, wait 3, write 45000, wait 5, reset")
	if err != nil {
		t.Fatal(err)
	}
	fails := func(p Program, tries int) bool {
		big := slices.ContainsFunc(p.Client, func(o Op) bool { return o.Do == opWrite && o.N > 1000 })
		return big && slices.ContainsFunc(p.Server, func(o Op) bool { return o.Do == opReset })
	}
	if short, failed := shrink(p, fails); !failed || short.String() != "client: write 1953 / server: reset" {
		t.Errorf("%q, %t", short, failed)
	}
	if _, failed := shrink(Program{}, fails); failed {
		t.Error("what never fails did")
	}
}

func TestPromise(t *testing.T) {
	sent := view{sent: 10, ended: true}
	reset := view{sent: 10, acked: 7, left: opReset}
	whole := view{sent: 10, acked: 10, ended: true, whole: true, left: opReset}
	closed := view{sent: 10, ended: true, left: opClose}
	allRead := view{sent: 10, ended: true, left: opClose, got: 1}
	proxy, scarce, direct := between{proxy: true}, between{proxy: true, short: true}, between{}
	const slow, behind = 3 * time.Second, "of 7 that were acknowledged"
	for _, c := range []struct {
		name     string
		from, to view
		by       between
		want     string // a part of the fault; "": there is none
	}{
		{"all and the end", sent, view{got: 10, over: sawEnd}, proxy, ""},
		{"too little before the end", sent, view{got: 9, over: sawEnd}, proxy, "behind 9 bytes of 10"},
		{"too much", sent, view{got: 11, over: sawEnd}, proxy, "read 11 bytes of 10"},
		{"an end that was not sent yet", sent, view{got: 10, over: sawEnd, early: true}, proxy, "had not ended"},
		{"no end", sent, view{got: 10}, proxy, "no end"},
		{"a reset out of nothing", sent, view{got: 10, over: sawReset}, proxy, "nobody made"},
		{"a reset out of nothing, told to a write", sent, view{got: 10, over: sawEnd, told: true}, proxy,
			"nobody made"},
		{"a reset out of nothing for who left", sent, view{left: opClose, told: true}, proxy, "nobody made"},
		{"a reader that left", sent, view{got: 3, left: opReset}, proxy, ""},

		{"a reset behind what was acknowledged", reset, view{got: 7, over: sawReset}, proxy, ""},
		{"a reset behind all", reset, view{got: 10, over: sawReset}, proxy, ""},
		{"a reset behind less", reset, view{got: 6, over: sawReset}, proxy, behind},
		{"a reset behind less, told to a write", reset, view{got: 6, over: sawEnd, told: true}, proxy, behind},
		{"a reset behind less for who stopped", reset, view{got: 6, over: sawReset, paused: slow}, proxy, ""},
		{"a reset behind less for who waited", reset, view{sent: 1, got: 6, over: sawReset, waited: slow}, proxy,
			behind},
		{"the same where much is missing", reset, view{sent: 1, got: 6, over: sawReset, waited: slow}, scarce, ""},
		{"the same for who sent nothing", reset, view{got: 6, over: sawReset, waited: slow}, scarce, behind},
		{"the same from TCP itself", reset, view{got: 6, over: sawReset, paused: slow}, direct, behind},
		{"a reset that looks like an end", reset, view{got: 10, over: sawEnd, early: true}, proxy, "had not ended"},
		{"a reset instead of an end", whole, view{got: 10, over: sawReset}, proxy, "instead of the end"},
		{"the same to who sends", whole, view{sent: 1, got: 10, over: sawReset}, proxy, ""},
		{"the same from TCP itself", whole, view{sent: 1, got: 10, over: sawReset}, direct, "instead of the end"},

		{"close with bytes unread", view{sent: 10, left: opClose, unread: true}, view{over: sawReset}, proxy, ""},
		{"close, and bytes come later", closed, view{sent: 1, over: sawReset}, proxy, ""},
		{"close with all read", allRead, view{sent: 1, got: 10, over: sawReset}, proxy, "nobody made"},
	} {
		got := strings.Join(promise(&c.from, &c.to, c.by), "; ")
		if got != c.want && (c.want == "" || !strings.Contains(got, c.want)) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// TestProgramsFind: each relay that does something wrong is found by few programs.
func TestProgramsFind(t *testing.T) {
	forward := func(from, to *net.TCPConn) error {
		_, err := io.Copy(to, from)
		return err
	}
	for _, c := range []struct {
		name, find string
		copy       func(from, to *net.TCPConn)
	}{
		{"a reset becomes an end", "the end of a stream that had not ended", func(from, to *net.TCPConn) {
			forward(from, to)
			to.CloseWrite()
		}},
		{"an end becomes a reset", "a reset that nobody made", func(from, to *net.TCPConn) {
			forward(from, to)
			abort(to)
		}},
		{"the end of one stream ends both", "", func(from, to *net.TCPConn) {
			forward(from, to)
			to.Close()
			from.Close()
		}},
		{"a reset loses what waits", "acknowledged before the reset", func(from, to *net.TCPConn) {
			if forward(from, to) != nil {
				abort(to)
			}
			to.CloseWrite()
		}},
		{"bytes come twice", "differs", func(from, to *net.TCPConn) {
			io.CopyN(to, from, 1000)
			b := make([]byte, 1)
			if n, _ := from.Read(b); n > 0 {
				to.Write(append(b, b...))
			}
			if forward(from, to) != nil {
				abort(to)
			}
			to.CloseWrite()
		}},
		{"the end is not passed on", "no end", func(from, to *net.TCPConn) {
			if forward(from, to) != nil {
				abort(to)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h := Hands{Path: Loopback{}.Path(t), Fast: true, Usual: true}
			connect := h.Path.Connect
			h.Path.Connect = func(t testing.TB) *Flow {
				f := connect(t)
				f.start = func(ctx context.Context, o relay.Options) {
					var both sync.WaitGroup
					d, u := f.Down.(*net.TCPConn), f.Up.(*net.TCPConn)
					both.Go(func() { c.copy(d, u) })
					both.Go(func() { c.copy(u, d) })
					stop := context.AfterFunc(ctx, func() { errors.Join(d.Close(), u.Close()) })
					go func() {
						both.Wait()
						stop()
						d.Close()
						u.Close()
						f.result <- relay.Result{End: relay.EndEOF}
					}()
				}
				return f
			}
			for i := range uint64(300) {
				for _, fault := range try(t, h, RandomProgram(1, i), 500*time.Millisecond) {
					if strings.Contains(fault, c.find) {
						return
					}
				}
			}
			t.Error("it was not found")
		})
	}
}
