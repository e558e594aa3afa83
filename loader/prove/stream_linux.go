package prove

import (
	"errors"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// Stream are the tests that every datapath has to pass.
var Stream = []Test{
	{"redirect", "bytes go both ways, whole, without passing through the process", (*trial).redirect},
	{"kick", "bytes that were queued before the splice arrive", (*trial).kick},
	{"trim", "an skb that was read in part is cut where cb[0] says", (*trial).trim},
	{"overlap", "an overlapping retransmit is delivered once", (*trial).overlap},
	{"bound", "a reader that stops also stops the sender, and loses nothing", (*trial).bound},
	{"bulk", "a busy direction leaves the sockmap and comes back, with every byte in its place", (*trial).bulk},
	{"drain", "data that is queued when a stream ends arrives before the end", (*trial).drain},
	{"reset", "a reset of either side reaches the other", (*trial).reset},
}

func (t *trial) redirect() {
	t.connectAndSplice()
	data := t.data(64 << 10)
	for _, way := range [][2]*net.TCPConn{{t.client, t.server}, {t.server, t.client}} {
		t.write(way[0], data)
		t.must(Expect(patient{way[1]}, data))
	}
	for i := range 2 {
		if m := t.d.Moved(i); m.Redirected+m.PastTCP == 0 {
			t.fail("nothing was redirected by the kernel")
		}
	}
	t.must(errors.Join(whole(t.client, t.server, data), whole(t.server, t.client, data)))
	t.end(EndEOF)
	if up, down := t.count(); up != 2*int64(len(data)) || down != 2*int64(len(data)) {
		t.fail("%d bytes were counted up and %d down, %d were sent each way", up, down, 2*len(data))
	}
}

func (t *trial) kick() {
	t.connect()
	data := t.data(3000)
	t.write(t.client, data)
	t.splice()
	t.must(Expect(patient{t.server}, data))
}

func (t *trial) trim() {
	t.connect()
	data := t.data(10000)
	t.write(t.client, data)
	t.must(Expect(patient{t.down}, data[:6000]))
	t.splice()
	t.must(Expect(patient{t.server}, data[6000:]))
}

func (t *trial) overlap() {
	t.connectAndSplice()
	data := t.data(9000)
	t.write(t.client, data[:100])
	t.must(Expect(patient{t.server}, data[:100]))
	const advice = "give the daemon CAP_NET_RAW and CAP_NET_ADMIN"
	in, err := NewInjector(t.client)
	if err != nil {
		t.skip(err, advice)
	}
	defer in.Close()
	// From 50 bytes back to 5000 bytes on; then the connection itself sends those 5000 once more, and 3900
	// that are new.
	if err := in.Send(-50, data[50:5100]); err != nil {
		t.skip(err, advice)
	}
	if err := Expect(patient{t.server}, data[100:5100]); err != nil {
		if t.d.Moved(0).Redirected == 100 {
			t.skip(errors.New("the segment did not come in, a firewall may have dropped it"), advice)
		}
		t.must(err)
	}
	t.write(t.client, data[100:])
	t.must(Expect(patient{t.server}, data[5100:]))
}

// shrink makes the buffers on the way small, so that little fills it.
func (t *trial) shrink() {
	t.must(errors.Join(t.client.SetWriteBuffer(64<<10), t.server.SetReadBuffer(32<<10),
		t.up.SetWriteBuffer(64<<10), t.down.SetReadBuffer(64<<10)))
}

func (t *trial) bound() {
	t.connect()
	t.shrink()
	t.splice()
	client, data, sent := t.client, t.data(4<<20), make(chan error, 1)
	go func() { // may outlive the trial
		_, err := client.Write(data)
		sent <- errors.Join(err, client.CloseWrite())
	}()
	// It stops by itself, with bytes left to userspace: nothing more is handled for a while.
	var last Moved
	for still, limit := 0, time.Now().Add(3*patience); still < 5 || last.Passed == 0; {
		time.Sleep(5 * time.Millisecond)
		now := t.d.Moved(0)
		if still++; now != last {
			last, still = now, 0
		}
		if n := now.Redirected + now.Passed + now.PastTCP; n > 2<<20 {
			t.fail("%d bytes were taken for a reader that does not read", n)
		}
		if time.Now().After(limit) {
			t.fail("the sender was not held up: %+v", now)
		}
	}
	t.must(Expect(patient{t.server}, data))
	t.must(<-sent)
}

func (t *trial) bulk() {
	if !t.d.GiveBack() {
		t.skip(errors.New("busy flows stay in the sockmap, which costs them some speed"), "")
	}
	t.connectAndSplice()
	client, data, sent := t.client, t.data(2<<20), make(chan error, 1)
	for round := range int32(2) {
		go func() { // may outlive the trial
			_, err := client.Write(data)
			sent <- err
		}()
		for part := data; len(part) > 0; part = part[min(len(part), len(data)/8):] {
			t.must(Expect(patient{t.server}, part[:min(len(part), len(data)/8)]))
			t.d.GiveBack()
		}
		t.must(<-sent)
		// While nothing comes it leaves at once; while much comes it may not, but what comes is whole.
		for limit := time.Now().Add(10 * patience); t.returns.Load() <= round; time.Sleep(time.Millisecond) {
			t.d.GiveBack()
			if time.Now().After(limit) {
				t.fail("the kernel does not take a socket out of the sockmap")
			}
		}
	}
	// The last time that it was asked may take it out once more.
	for limit := time.Now().Add(10 * patience); ; {
		before := t.d.Moved(0).Redirected
		t.write(client, data[:1000])
		t.must(Expect(patient{t.server}, data[:1000]))
		if before > 0 && t.d.Moved(0).Redirected > before {
			return
		}
		if time.Now().After(limit) {
			t.fail("nothing was redirected by the kernel any more")
		}
	}
}

func (t *trial) drain() {
	t.connectAndSplice()
	t.must(errors.Join(whole(t.client, t.server, t.data(1<<20)), whole(t.server, t.client, t.data(1<<20))))
	t.end(EndEOF)
}

func (t *trial) reset() {
	for _, up := range []bool{false, true} {
		t.connectAndSplice()
		from, to, want := t.client, t.server, EndDownstreamReset
		if up {
			from, to, want = t.server, t.client, EndUpstreamReset
		}
		t.must(errors.Join(from.SetLinger(0), from.Close()))
		var b [1]byte
		if _, err := (patient{to}).Read(b[:]); !errors.Is(err, unix.ECONNRESET) {
			t.fail("a reset arrived as %v", err)
		}
		t.end(want)
	}
}
