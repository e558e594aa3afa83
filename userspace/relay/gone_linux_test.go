package relay_test

import (
	"context"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// TestBothGone: nobody waits for a connection to acknowledge what it was sent that has been reset as well: one
// end closes, the other sends a little, as TLS does at its end, and resets.
func TestBothGone(t *testing.T) {
	const flows, soon = 200, 15 * time.Second // half of what a reader has that TCP brings nothing
	p := relaytest.Loopback{}.Path(t)
	for name, ends := range map[string]func(f *relaytest.Flow) (closes, resets net.Conn){
		"the server closes": func(f *relaytest.Flow) (closes, resets net.Conn) { return f.Server, f.Client },
		"the client closes": func(f *relaytest.Flow) (closes, resets net.Conn) { return f.Client, f.Server },
	} {
		t.Run(name, func(t *testing.T) {
			var all sync.WaitGroup
			defer all.Wait()
			for range flows {
				f := p.Connect(t)
				f.Start(context.Background(), relay.Options{})
				closes, resets := ends(f)
				if err := relaytest.Both(f.Client, f.Server, 1000); err != nil {
					t.Fatal(err)
				}
				closes.Close()
				if n, err := resets.Read(make([]byte, 1)); n != 0 || err != io.EOF {
					t.Fatalf("%d bytes, %v: want the end", n, err)
				}
				resets.Write(make([]byte, 31))
				resets.(*net.TCPConn).SetLinger(0)
				resets.Close()
				reset := time.Now()
				all.Go(func() {
					if r := f.Result(t); time.Since(reset) > soon {
						t.Errorf("it ends %v after both ends are gone: %+v", time.Since(reset), r)
					}
				})
			}
		})
	}
}
