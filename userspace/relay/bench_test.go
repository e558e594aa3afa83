package relay_test

import (
	"context"
	"io"
	"net"
	"testing"

	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// relays are what the benchmarks compare.
var relays = []struct {
	name  string
	start func(f *relaytest.Flow)
}{
	{"relay", func(f *relaytest.Flow) { f.Start(context.Background(), relay.Options{}) }},
	{"iocopy", func(f *relaytest.Flow) {
		one := func(dst, src net.Conn) {
			io.Copy(dst, src)
			dst.(*net.TCPConn).CloseWrite()
		}
		go one(f.Up, f.Down)
		go one(f.Down, f.Up)
	}},
}

func BenchmarkBulk(b *testing.B) {
	for _, r := range relays {
		b.Run(r.name, func(b *testing.B) {
			f := relaytest.Loopback{}.Path(b).Connect(b)
			r.start(f)
			defer f.Client.Close()
			defer f.Server.Close()
			go io.Copy(io.Discard, struct{ io.Reader }{f.Server})
			buf := make([]byte, 256<<10)
			b.SetBytes(int64(len(buf)))
			for b.Loop() {
				if _, err := f.Client.Write(buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkRoundTrip(b *testing.B) {
	for _, r := range relays {
		b.Run(r.name, func(b *testing.B) {
			f := relaytest.Loopback{}.Path(b).Connect(b)
			r.start(f)
			defer f.Client.Close()
			defer f.Server.Close()
			go io.Copy(struct{ io.Writer }{f.Server}, struct{ io.Reader }{f.Server})
			buf := make([]byte, 64)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := f.Client.Write(buf); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(f.Client, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkFlow(b *testing.B) {
	for _, r := range relays {
		b.Run(r.name, func(b *testing.B) {
			p := relaytest.Loopback{}.Path(b)
			b.ReportAllocs()
			for b.Loop() {
				f := p.Connect(b)
				r.start(f)
				if err := relaytest.Exchange(f.Client, f.Server, 1000, 1000); err != nil {
					b.Fatal(err)
				}
				f.Up.Close() // the relay has done it, io.Copy not
				f.Down.Close()
			}
		})
	}
}
