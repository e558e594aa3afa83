package loader

import (
	"errors"
	"fmt"
	"io"
	"time"
)

// proveLocal tries the part for local targets on loopback, and takes it away with a reason if it does not work.
func (l *Loader) proveLocal() {
	if l.local != nil {
		l.local.proof = l.local.selfTest()
		if err := failed(l.local.proof); err != nil {
			l.localOff = err
			l.local.counts.off.Store(new(string))
		}
	}
	if l.localOff != nil {
		l.log.Warn("datapath sk_msg is not available: its flows use sockmap or userspace", "reason", l.localOff)
	}
}

func (n *Local) selfTest() []Finding {
	return n.l.try(true, []test{
		{"sk_msg", "data bypasses TCP in both directions, complete and in order", (*trial).pastTCP, ""},
		{"sk_msg: order", "data that came by TCP is read before data that bypasses it", (*trial).localOrder, ""},
		{"sk_msg: bound", "a process that stops reading stops the sender, and loses nothing", (*trial).bound, ""},
		{"sk_msg: end", "what a process has not read when a stream ends is not lost", (*trial).skmsgEnd, ""},
		{"sk_msg: reset", "a reset of either side reaches the other", (*trial).reset, ""},
	})
}

// localFindings are for doctor. The part is no condition for the rest.
func (l *Loader) localFindings() []Finding {
	if l.local == nil {
		return []Finding{{Name: "sk_msg", State: StateDegraded, Detail: l.localOff.Error(), Advice: "nothing to do unless a route says `datapath: " + LocalName + "`"}}
	}
	findings := append([]Finding(nil), l.local.proof...)
	for i := range findings {
		if findings[i].State == StateMissing {
			findings[i].State = StateDegraded
		}
	}
	return findings
}

func (t *trial) pastTCP() error {
	if err := errors.Join(t.connect()); err != nil {
		return err
	}
	if err := t.splice(); err != nil {
		return err
	}
	f, data := t.flow(), pattern(1000)
	for range 3 {
		if _, err := t.client.Write(data); err != nil {
			return err
		}
		if err := expect(t.server, data); err != nil {
			return err
		}
		if _, err := t.server.Write(data); err != nil {
			return err
		}
		if err := expect(t.client, data); err != nil {
			return err
		}
	}
	for i := range f.directions {
		if n := f.directions[i].snapshot().local; n != uint64(3*len(data)) {
			return fmt.Errorf("%d of %d bytes bypassed TCP", n, 3*len(data))
		}
	}
	t.close()
	return t.redirect()
}

// localOrder: bytes wait in TCP both ways before the splice, and more come after it.
func (t *trial) localOrder() error {
	if err := t.connect(); err != nil {
		return err
	}
	data := pattern(3000)
	for _, write := range []io.Writer{t.up, t.server} {
		if _, err := write.Write(data[:1000]); err != nil {
			return err
		}
	}
	if err := t.splice(); err != nil {
		return err
	}
	for at := 1000; at < len(data); at += 1000 {
		for _, write := range []io.Writer{t.client, t.server} {
			if _, err := write.Write(data[at : at+1000]); err != nil {
				return err
			}
		}
	}
	return errors.Join(expect(t.server, data), expect(t.client, data))
}

// skmsgEnd: the process has ended its stream; the other one ends with bytes that it has not read.
func (t *trial) skmsgEnd() error {
	if err := t.connect(); err != nil {
		return err
	}
	if err := t.splice(); err != nil {
		return err
	}
	if err := t.server.CloseWrite(); err != nil {
		return err
	}
	var b [1]byte
	if n, err := t.client.Read(b[:]); n != 0 || err != io.EOF {
		return fmt.Errorf("the end of the stream arrived as %d bytes, %v", n, err)
	}
	data := pattern(1000)
	if _, err := t.client.Write(data); err != nil {
		return err
	}
	if err := t.client.CloseWrite(); err != nil {
		return err
	}
	time.Sleep(20 * time.Millisecond)
	if err := expect(t.server, data); err != nil {
		return err
	}
	if n, err := t.server.Read(b[:]); n != 0 || err != io.EOF {
		return fmt.Errorf("the end of the stream arrived as %d bytes, %v", n, err)
	}
	return t.end(endEOF)
}
