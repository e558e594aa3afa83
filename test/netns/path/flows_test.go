package path

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/proxyheader"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// TestFlows runs the table of cases through three daemons and two hops of tailnet: 1,000 flows at once of
// random sizes up to 4 MiB both ways, half-close in both orders, resets from each side.
func TestFlows(t *testing.T) {
	s := world(t)
	size := relaytest.SmallSize()
	for _, family := range []string{"tcp6", "tcp4"} {
		t.Run(family, func(t *testing.T) {
			ln, err := s.Laptop.Listen("tcp", "127.0.0.1:9000")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			if family == "tcp4" {
				size.Concurrent, size.Flow = 1000, 4<<20
			}
			dial := func() (net.Conn, error) {
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				defer cancel()
				return s.Client.Dial(ctx, family, lab.Site+":9000")
			}
			relaytest.Run(t, relaytest.Path{Dial: relaytest.Through(dial, ln, nil),
				PIDs: []int{s.edgeA.Pid(), s.home.Pid(), s.laptop.Pid()}}, size)
		})
	}
}

// TestStranger: a PROXY header from a node that accept_proxy.from does not name closes the connection, is
// counted, and the log says who it was. The same node without a header is a visitor like any other.
func TestStranger(t *testing.T) {
	s := world(t)
	before := status(t, s.home).Refused["proxy_from_stranger"]
	home, err := s.Friend.Dial(t.Context(), "tcp", net.JoinHostPort(s.Home.Node.IP4.String(), "443"))
	if err != nil {
		t.Fatal(err)
	}
	defer home.Close()
	home.SetDeadline(time.Now().Add(patience))
	home.Write(proxyheader.Header{Source: addrPort("203.0.113.99:1234"),
		Destination: addrPort("192.0.2.80:443")}.Append(nil))
	if n, err := home.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Error("home answers a stranger's PROXY header")
	}
	eventually(t, "it is counted", func() error {
		if n := status(t, s.home).Refused["proxy_from_stranger"]; n != before+1 {
			return fmt.Errorf("counted %d times", n-before)
		}
		return nil
	})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	l, err := s.home.WaitLog(ctx, func(l lab.LogLine) bool { return l["reason"] == "proxy_from_stranger" })
	if err != nil {
		t.Fatal(err)
	}
	if text := fmt.Sprint(l["err"]); !contains(text, "friend", lab.TestUser) {
		t.Errorf("the log does not say who it was: %s", text)
	}
	c := s.browser(s.Friend, "tcp4", false)
	defer c.CloseIdleConnections()
	c.Transport = directTo(s, s.Friend, net.JoinHostPort(s.Home.Node.IP4.String(), "443"))
	res, err := c.Get("https://" + lab.Site + "/status?code=200")
	if err != nil {
		t.Fatalf("without a header: %v", err)
	}
	res.Body.Close()
	if res.StatusCode != 200 {
		t.Errorf("without a header: %s", res.Status)
	}
}

// TestAbuse: while strangers do their worst at the edge, each gets what it deserves, and a normal request
// takes no longer than twice its usual time. The strangers share this machine's two cores with everybody
// else, so they take their time.
func TestAbuse(t *testing.T) {
	s := world(t)
	s.configure(t, s.edgeA, strings.ReplaceAll(edgeConfig, limits, "")) // the default limits
	usual := s.requestTime(t, 30)
	before := status(t, s.edgeA)
	stop := make(chan struct{})
	var strangers sync.WaitGroup
	// connect makes connections from the cloud, so that the limit on one source does not hit the visitor.
	connect := func(pause time.Duration, n int, what func(net.Conn)) {
		for range n {
			select {
			case <-stop:
				return
			case <-time.After(pause):
			}
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			c, err := s.Cloud.Dial(ctx, "tcp4", lab.Site+":443")
			cancel()
			if err == nil {
				c.SetDeadline(time.Now().Add(8 * time.Second))
				what(c)
			}
		}
	}
	const forever = 1 << 30
	for _, what := range []func(net.Conn){
		func(c net.Conn) { io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n") }, // not TLS
		func(c net.Conn) { c.Write(endlessHello) },                                  // too large
		// Never complete.
		func(c net.Conn) { io.WriteString(c, "\x16\x03\x01\x02\x00\x01\x00\x01") },
		// To a listener that takes none.
		func(c net.Conn) { io.WriteString(c, "PROXY TCP4 198.51.100.1 192.0.2.80 1 443\r\n") },
	} {
		strangers.Go(func() { connect(50*time.Millisecond, forever, func(c net.Conn) { what(c); drain(c) }) })
	}
	idle := make(chan struct{})
	var held []net.Conn
	strangers.Go(func() {
		defer close(idle)
		connect(500*time.Microsecond, 10_000, func(c net.Conn) { held = append(held, c) })
	})
	var times []time.Duration
	for done := false; !done; {
		select {
		case <-idle:
			done = true
		default:
			times = append(times, s.requestTime(t, 1))
			time.Sleep(50 * time.Millisecond)
		}
	}
	close(stop)
	strangers.Wait()
	var after daemonStatus
	refused := map[string]int64{}
	// Those that say nothing are displaced by newcomers; the last of them run out of time.
	eventually(t, "the last that said nothing run out of time", func() error {
		after = status(t, s.edgeA)
		for reason, n := range after.Refused {
			refused[reason] = n - before.Refused[reason]
		}
		if refused["hello_timeout"] < 10 {
			return fmt.Errorf("refused: %v", refused)
		}
		return nil
	})
	for _, c := range held {
		c.Close()
	}
	meanwhile := median(times)
	usual = max(usual, s.requestTime(t, 30)) // this machine may have become busier with something else
	t.Logf("a request takes %v, meanwhile %v (%d requests); of %d connections refused: %v",
		usual, meanwhile, len(times), after.Accepted["web"]-before.Accepted["web"], refused)
	if meanwhile > 2*usual {
		t.Errorf("a request takes %v, meanwhile %v: want twice the usual at most", usual, meanwhile)
	}
	if refused["over_limit"]+refused["hello_displaced"] < 10_000-256*10 || refused["not_tls"] < 10 ||
		refused["hello_too_large"]+refused["hello_rejected"] < 10 {
		t.Errorf("refused: %v", refused)
	}
	eventually(t, "nothing is left at the edge", func() error {
		if n := s.edgeA.Files(); n > 100 {
			return fmt.Errorf("%d open files", n)
		}
		return nil
	})
}

// endlessHello begins a hello of 16 MiB and goes on for longer than any limit.
var endlessHello = append([]byte{22, 3, 1, 64, 0, 1, 255, 255, 255, 3, 3}, make([]byte, 200<<10)...)

// requestTime is the median time of n requests, each on a connection of its own.
func (s *story) requestTime(t *testing.T, n int) time.Duration {
	t.Helper()
	var times []time.Duration
	for range n {
		begin := time.Now()
		if _, err := s.page(t.Context(), "tcp4"); err != nil {
			t.Fatal(err)
		}
		times = append(times, time.Since(begin))
	}
	return median(times)
}
