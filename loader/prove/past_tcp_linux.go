package prove

import (
	"errors"
	"io"
	"time"
)

// PastTCP are the tests of a datapath whose bytes go past TCP to a process on this host.
var PastTCP = []Test{
	{"sk_msg", "data bypasses TCP in both directions, complete and in order", (*trial).pastTCP},
	{"sk_msg: order", "data that came by TCP is read before data that bypasses it", (*trial).localOrder},
	{"sk_msg: bound", "a process that stops reading stops the sender, and loses nothing", (*trial).bound},
	{"sk_msg: end", "what a process has not read when a stream ends is not lost", (*trial).localEnd},
	{"sk_msg: reset", "a reset of either side reaches the other", (*trial).reset},
}

func (t *trial) pastTCP() {
	t.connectAndSplice()
	data := t.data(1000)
	for range 3 {
		t.write(t.client, data)
		t.must(Expect(t.server, data))
		t.write(t.server, data)
		t.must(Expect(t.client, data))
	}
	for i := range 2 {
		if n := t.d.Moved(i).PastTCP; n != uint64(3*len(data)) {
			t.fail("%d of %d bytes bypassed TCP", n, 3*len(data))
		}
	}
	t.close()
	t.redirect()
}

// localOrder: bytes wait in TCP both ways before the splice, and more come after it.
func (t *trial) localOrder() {
	t.connect()
	data := t.data(3000)
	for _, write := range []io.Writer{t.up, t.server} {
		t.write(write, data[:1000])
	}
	t.splice()
	for at := 1000; at < len(data); at += 1000 {
		for _, write := range []io.Writer{t.client, t.server} {
			t.write(write, data[at:at+1000])
		}
	}
	t.must(errors.Join(Expect(t.server, data), Expect(t.client, data)))
}

// localEnd: the process has ended its stream; the other one ends with bytes that it has not read.
func (t *trial) localEnd() {
	t.connectAndSplice()
	t.must(t.server.CloseWrite())
	t.must(expectEnd(t.client))
	data := t.data(1000)
	t.write(t.client, data)
	t.must(t.client.CloseWrite())
	time.Sleep(20 * time.Millisecond)
	t.must(Expect(t.server, data))
	t.must(expectEnd(t.server))
	t.end(EndEOF)
}
