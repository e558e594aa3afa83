package relay_test

import (
	"context"
	"io"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/tcpsock"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// TestCopiesOfFlow: there are copies of the sockets of a flow whoever has it, and of one that has ended there are none.
func TestCopiesOfFlow(t *testing.T) {
	for name, o := range map[string]relay.Options{
		"on a loop":  {},
		"parked":     relay.WithParkAfter(relay.Options{}, time.Millisecond),
		"handed off": {Datapaths: []datapath.Datapath{taker{}}, Copied: true},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			f := relaytest.Loopback{Options: o}.Path(t).Connect(t)
			defer f.Client.Close()
			defer f.Server.Close()
			c := new(relay.Counters)
			f.Start(ctx, relay.Options{Counters: c})
			if name != "handed off" {
				big := 1
				if name == "parked" {
					big = 8 << 20 // which makes it one of pumps
				}
				go f.Client.Write(make([]byte, big))
				if _, err := io.ReadFull(f.Server, make([]byte, big)); err != nil {
					t.Fatal(err)
				}
			}
			var down, up int
			for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
				var err error
				if down, up, err = c.Copies(); err == nil {
					break
				} else if time.Now().After(end) {
					t.Fatal(err)
				}
			}
			defer unix.Close(down)
			defer unix.Close(up)
			if got, want := tcpsock.Remote(down), tcpsock.AddrPortOf(f.Client.LocalAddr()); got != want {
				t.Errorf("downstream is a socket to %v, want %v", got, want)
			}
			if got, want := tcpsock.Remote(up), tcpsock.AddrPortOf(f.Server.LocalAddr()); got != want {
				t.Errorf("upstream is a socket to %v, want %v", got, want)
			}
			cancel()
			f.Result(t)
			if _, _, err := c.Copies(); err == nil {
				t.Error("there are copies after the end")
			}
		})
	}
}
