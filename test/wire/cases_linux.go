package wire

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// A Case is a way to send a stream.
type Case struct {
	Name string
	// Early: the datapath begins in the middle, when the case calls begin.
	Early bool
	// Stopped: the other end's reader waits until the case calls read, and buffers should be small.
	Stopped bool

	size   int
	urgent int // position of an urgent byte, which may be missing at the other end; 0: there is none
	// send sends data, and gives how much of it: all, but for the cases that want to be stopped.
	send func(c *Conn, data []byte, begin, read func()) (int, error)
}

// Cases are all, each of which sends bytes twice.
func Cases() []Case {
	return []Case{
		{Name: "each segment overlaps the one before", size: 60_000, send: overlapping},
		{Name: "a segment comes again, and more with it", size: 60_000, send: again},
		{Name: "large segments overlap by much", size: 200_000, send: large},
		{Name: "out of order, and overlapping", size: 60_000, send: backwards},
		{Name: "one byte a segment, and the one before it", size: 3000, send: bytewise},
		{Name: "at random", size: 60_000, send: random},
		{Name: "an overlap at the start of the datapath", size: 5000, Early: true, send: early},
		{Name: "overlaps while the reader has stopped", size: 3 << 20, Stopped: true, send: stopped},
		{Name: "overlaps into a closed window", size: 3 << 20, Stopped: true, send: closedWindow},
		{Name: "an urgent byte that comes again", size: 6000, urgent: 2999, send: urgentAgain},
		{Name: "an urgent byte is 64 KiB ahead", size: 130_000, send: urgentAhead},
		{Name: "the end comes with an overlap", size: 6000, send: endAgain},
	}
}

// Run sends over c, and compares what other reads until its end. begin starts what is between the two.
func (k Case) Run(c *Conn, other *net.TCPConn, begin func()) error {
	data := make([]byte, k.size)
	rand.NewChaCha8([32]byte{'w'}).Read(data)
	if !k.Early {
		begin()
		begin = nil
	}
	may := make(chan struct{})
	if !k.Stopped {
		close(may)
	}
	read := sync.OnceFunc(func() {
		if k.Stopped {
			close(may)
		}
	})
	defer read()
	result, length := make(chan error, 1), new(atomic.Int64)
	go func() {
		<-may
		err := k.compare(other, data, length)
		if err != nil {
			other.SetLinger(0) // whoever still sends hears of it
			other.Close()
		}
		result <- err
	}()
	length.Store(int64(len(data)))
	n, err := k.send(c, data, begin, read)
	length.Store(int64(n))
	if err != nil {
		c.Reset()
		read()
		return errors.Join(err, <-result)
	}
	for range 100 { // the end of the stream, until it is acknowledged
		c.SendLast(n-100, data[n-100:n])
		if c.waitUntil(time.Now().Add(patience/100), func() bool { return c.acked > n }) == nil {
			break
		}
	}
	return <-result
}

// compare reads to the end, which comes when length bytes of want were sent, and tells the first difference.
func (k Case) compare(r *net.TCPConn, want []byte, length *atomic.Int64) error {
	b, at, less := make([]byte, 64<<10), 0, 0
	for {
		r.SetReadDeadline(time.Now().Add(patience))
		n, err := r.Read(b)
		got := b[:n]
		if k.urgent > 0 && at <= k.urgent && at+n > k.urgent && got[k.urgent-at] != want[k.urgent] {
			// without the urgent byte
			want, less = append(bytes.Clone(want[:k.urgent]), want[k.urgent+1:]...), 1
		}
		if at+n > len(want) || !bytes.Equal(got, want[at:at+n]) {
			return fmt.Errorf("after %d bytes of %d other ones arrived than were sent", at, len(want))
		}
		at += n
		switch {
		case err == io.EOF && at == int(length.Load())-less:
			return nil
		case err != nil:
			return fmt.Errorf("after %d bytes of %d: %w", at, len(want), err)
		}
	}
}

// goOn sends what is not acknowledged in pieces, each of which repeats the end of the one before, and waits
// for each burst.
func goOn(c *Conn, data []byte, step, back int) (int, error) {
	for at := c.Acked(); at < len(data); {
		for range 8 {
			from, to := max(0, at-back), min(at+step, len(data))
			c.Send(from, data[from:to])
			at = to
		}
		if err := c.Until(at, data); err != nil {
			return 0, err
		}
	}
	return len(data), nil
}

func overlapping(c *Conn, data []byte, _, _ func()) (int, error) {
	return goOn(c, data, 700, 500)
}

func again(c *Conn, data []byte, _, _ func()) (int, error) {
	for at := 0; at < len(data); at += 1200 {
		to := min(at+1200, len(data))
		c.Send(at, data[at:min(at+600, to)])
		c.Send(at, data[at:min(at+600, to)])
		c.Send(at, data[at:to])
		if err := c.Until(to, data); err != nil {
			return 0, err
		}
	}
	return len(data), nil
}

// large: more than what a call cuts off, and less than an IP packet. Further ahead than the window is nothing
// taken.
func large(c *Conn, data []byte, _, _ func()) (int, error) {
	for at := 0; at < len(data); at += 10_000 {
		to, from := min(at+10_000, len(data)), max(0, at-13_000)
		c.Send(from, data[from:to])
		if err := c.Until(to, data); err != nil {
			return 0, err
		}
	}
	return len(data), nil
}

func backwards(c *Conn, data []byte, _, _ func()) (int, error) {
	const block, piece, more = 6000, 1000, 400
	for at := 0; at < len(data); at += block {
		for p := min(at+block, len(data)) - piece; p >= at; p -= piece {
			from := max(0, p-more)
			c.Send(from, data[from:min(p+piece+more, len(data))])
		}
		if err := c.Until(min(at+block, len(data)), data); err != nil {
			return 0, err
		}
	}
	return len(data), nil
}

func bytewise(c *Conn, data []byte, _, _ func()) (int, error) {
	return goOn(c, data, 1, 1)
}

func random(c *Conn, data []byte, _, _ func()) (int, error) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := 0; c.Acked() < len(data); i++ {
		acked := c.Acked()
		at := max(0, acked-3000+rnd.IntN(9000))
		to := min(at+1+rnd.IntN(1400), len(data))
		if at < to {
			c.Send(at, data[at:to])
		}
		if i%16 == 15 {
			to := min(acked+1+rnd.IntN(3000), len(data))
			if err := c.Until(to, data); err != nil {
				return 0, err
			}
		}
	}
	return len(data), nil
}

func early(c *Conn, data []byte, begin, _ func()) (int, error) {
	c.Send(0, data[:1500])
	if err := c.Until(1500, data); err != nil {
		return 0, err
	}
	c.Send(2000, data[2000:3000]) // waits for what is missing before it
	begin()
	c.Send(1000, data[1000:2500])
	return len(data), c.Until(len(data), data)
}

// fill sends, with overlaps all the time, until nothing more is taken: meanwhile the datapath goes over to
// holding bytes back, and has some that it has not read.
func fill(c *Conn, data []byte) error {
	for at := 0; at < len(data)-goOnFor; {
		was := c.Acked()
		for range 16 {
			from, to := max(0, at-600), min(at+800, len(data))
			c.Send(from, data[from:to])
			at = to
		}
		if c.waitUntil(time.Now().Add(300*time.Millisecond), func() bool { return c.acked >= at }) != nil && c.Acked() == was {
			return nil
		}
		at = c.Acked()
	}
	return errors.New("all was taken for a reader that had stopped: this proves nothing")
}

// goOnFor is how many bytes come once the reader goes on.
const goOnFor = 100_000

func stopped(c *Conn, data []byte, _, read func()) (int, error) {
	if err := fill(c, data); err != nil {
		return 0, err
	}
	read()
	return goOn(c, data[:c.Acked()+goOnFor], 800, 600)
}

// closedWindow: what comes when nothing is taken any more may be dropped, and comes again when there is room.
func closedWindow(c *Conn, data []byte, _, read func()) (int, error) {
	if err := fill(c, data); err != nil {
		return 0, err
	}
	for i := range 50 {
		at := c.Acked()
		from := max(0, at-30*(i+1))
		c.Send(from, data[from:at+1+i*20])
		c.Send(at, data[at:at+1])
	}
	read()
	return goOn(c, data[:c.Acked()+goOnFor], 1100, 300)
}

func urgentAgain(c *Conn, data []byte, _, _ func()) (int, error) {
	c.Send(0, data[:2000])
	c.SendUrgent(1500, data[1500:3000])
	c.SendUrgent(1000, data[1000:3000])
	c.Send(2500, data[2500:4000])
	c.Send(2000, data[2000:5000])
	return len(data), c.Until(len(data), data)
}

// urgentAhead: while an urgent byte is further ahead than an urgent pointer reaches, Linux lets that point as
// far as it reaches. What is sent again once more is under way has none, so an ordinary byte stays marked.
func urgentAhead(c *Conn, data []byte, _, _ func()) (int, error) {
	c.sendWith(0, data[:1000], psh|urg, 0xffff)
	return goOn(c, data, 1000, 0)
}

func endAgain(c *Conn, data []byte, _, _ func()) (int, error) {
	c.Send(0, data[:3000])
	if err := c.Until(3000, data); err != nil {
		return 0, err
	}
	c.SendLast(2000, data[2000:])
	c.SendLast(4000, data[4000:])
	return len(data), nil
}
