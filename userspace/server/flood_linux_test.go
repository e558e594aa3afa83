package server

import (
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestFloodLeavesNothing: connections that break at any stage of their way, while configurations come and go and
// descriptors run out, leave no descriptor, goroutine, place or byte behind.
func TestFloodLeavesNothing(t *testing.T) {
	const each = 100 // connections of a kind
	live := backend(t, echo)
	refused, silent := freeAddr(t), full(t)
	sniAt, tcpAt, hopAt, other := freeAddr(t), freeAddr(t), freeAddr(t), freeAddr(t)
	config := func(sniAt string) string {
		return fmt.Sprintf(`
listeners:
  - name: names
    listen: [%q]
    mode: sni
    routes:
      - { sni: [live.test], forward: %q }
      - { sni: [refused.test], forward: %q }
      - { sni: [silent.test], forward: %q }
  - { name: plain, listen: [%q], mode: tcp, default: { forward: %q } }
  - { name: hops, listen: [%q], mode: sni, accept_proxy: { from: [127.0.0.1] }, default: { forward: %q } }
limits: { connections_per_source: 100000, hello_timeout: 2s }`, sniAt, live, refused, silent, tcpAt, live, hopAt, live)
	}
	d := start(t, config(sniAt))
	header := "PROXY TCP4 198.51.100.7 192.0.2.1 4000 443\r\n"
	type kind struct {
		name, at string
		says     []byte
		ends     func(c *net.TCPConn)
	}
	reset := func(c *net.TCPConn) { c.SetLinger(0); c.Close() }
	shut := func(c *net.TCPConn) {
		c.CloseWrite()
		c.SetReadDeadline(time.Now().Add(patience))
		io.Copy(io.Discard, c)
		c.Close()
	}
	var kinds []kind
	add := func(name, at string, says []byte) {
		kinds = append(kinds, kind{name + ", reset", at, says, reset}, kind{name + ", shut", at, says, shut},
			kind{name + ", closed", at, says, func(c *net.TCPConn) { c.Close() }})
	}
	hello := helloFor(t, "live.test")
	add("nothing", sniAt, nil)
	add("half a hello", sniAt, hello[:len(hello)/2])
	add("a hello", sniAt, hello)
	add("a hello and more", sniAt, append(hello[:len(hello):len(hello)], make([]byte, 20<<10)...))
	add("a refused target", sniAt, helloFor(t, "refused.test"))
	add("no target", sniAt, helloFor(t, "nobody.test"))
	add("no TLS", sniAt, []byte("GET / HTTP/1.1\r\n\r\n"))
	add("nothing to a tcp listener", tcpAt, nil)
	add("a message", tcpAt, []byte("hello"))
	add("nothing by a hop", hopAt, nil)
	add("half a header", hopAt, []byte(header)[:20])
	add("a header", hopAt, []byte(header))
	add("a header and half a hello", hopAt, append([]byte(header), hello[:100]...))
	add("a header and a hello", hopAt, append([]byte(header), hello...))
	for i := range kinds[:3] { // one: it takes as long as a dial may
		k := kinds[i]
		kinds = append(kinds, kind{"a silent target, " + strings.TrimPrefix(k.name, "nothing, "), sniAt, helloFor(t, "silent.test"), k.ends})
	}

	flood := func(n int) {
		var all sync.WaitGroup
		for i, k := range kinds {
			most := n
			if i >= len(kinds)-3 {
				most = n / each
			}
			all.Go(func() {
				for range most {
					c, err := net.Dial("tcp", k.at)
					if err != nil {
						continue // not listening now, or out of descriptors
					}
					c.Write(k.says)
					k.ends(c.(*net.TCPConn))
				}
			})
		}
		all.Wait()
	}
	settle := func() (files, goroutines int) {
		t.Helper()
		eventually(t, "all have ended", func() bool {
			d.spare.refill()
			return d.flows.Len() == 0 && d.limiter.Total() == 0
		})
		d.conns.Wait()
		if n := d.limiter.Yielding(); n != 0 {
			t.Errorf("%d places yield", n)
		}
		if n := d.partialBytes.Load(); n != 0 {
			t.Errorf("%d bytes of hellos are counted", n)
		}
		last := -1
		eventually(t, "nothing moves", func() bool {
			time.Sleep(100 * time.Millisecond)
			list, _ := os.ReadDir("/proc/self/fd")
			files, goroutines = len(list), runtime.NumGoroutine()
			same := last == files*100000+goroutines
			last = files*100000 + goroutines
			return same
		})
		return files, goroutines
	}
	flood(10)
	files, goroutines := settle()

	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(50 * time.Millisecond):
			}
			if err := d.Reload(parse(t, config([]string{other, sniAt}[i%2]))); err != nil {
				t.Error(err)
			}
		}
	}()
	flood(each)
	close(stop)
	<-stopped
	if err := d.Reload(parse(t, config(sniAt))); err != nil {
		t.Fatal(err)
	}
	check := func(after string) {
		t.Helper()
		if f, g := settle(); f > files+2 || g > goroutines+5 {
			t.Errorf("%s there are %d descriptors, and %d goroutines; before there were %d and %d", after, f, g, files, goroutines)
			buf := make([]byte, 1<<20)
			t.Logf("%s", buf[:runtime.Stack(buf, true)])
		}
	}
	check("after a flood")

	// Where descriptors run out in the middle.
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	few := limit
	few.Cur = uint64(files + 60)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &few); err != nil {
		t.Fatal(err)
	}
	flood(each / 4)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	check("after one without descriptors")
	c := dialTCP(t, tcpAt)
	c.Write([]byte("x"))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Errorf("it serves no more: %v", err)
	}
}
