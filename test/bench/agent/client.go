package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/test/bench/stream"
)

// Job is what the client is to do with a number of flows.
type Job struct {
	Cell     uint32
	Addr     netip.AddrPort
	Kind     Kind
	Flows    int    // at a time
	Size     int    // bytes of a request and of a response
	Preface  []byte // that each flow sends before the hello, for the proxy alone
	Warm     time.Duration
	Duration time.Duration
	Limit    time.Duration // after Duration, flows that have not ended are broken
}

// Kind is a kind of job.
type Kind string

const (
	Up       Kind = "up"       // each flow sends as fast as it can
	Down     Kind = "down"     // each flow receives as fast as it can
	Requests Kind = "requests" // each flow sends a request when it has the response to the one before
	Connects Kind = "connects" // a flow is one request of Size; when it has ended the next one begins
	Hold     Kind = "hold"     // each flow has one request, and then waits for [Client.Resume]
	Stall    Kind = "stall"    // each flow receives a little, and then does not read until [Client.Resume]
	Fill     Kind = "fill"     // each flow sends what it can, which nobody reads until [Server.Stop]
)

// stallLimit is how long flows of a Stall or a Fill may take to end.
const stallLimit = 40 * time.Second

// opening is how many flows a loop opens at a time, so that no backlog of 128 or more overflows.
const opening = 64

// Client is the near end of all flows. It has one job at a time.
type Client struct {
	hello []byte
	loops []*loop
	jobs  []*job
	next  atomic.Uint32 // flow
	job   Job
}

// NewClient makes a client of so many threads.
func NewClient(hello []byte, threads int) (*Client, error) {
	c := &Client{hello: hello}
	for range threads {
		l, err := newLoop()
		if err != nil {
			return nil, err
		}
		c.loops = append(c.loops, l)
	}
	return c, nil
}

// job is a loop's share of a Job.
type job struct {
	client *Client
	job    Job
	loop   *loop
	cell   cell
	want   int // flows at a time
	began  int // flows in all
	live   int
	ready  int   // flows that have done their first request
	start  int64 // of the measuring; 0 = still warming up
	paused chan struct{}
	ended  chan struct{}
	last   bool // no further flow begins
}

// steps of a flow
const (
	connecting = iota
	waiting    // for the others, or for Resume
	working
	leaving // has ended its stream
)

// Run does a job. Hold, Stall and Fill return when all flows wait, and are ended by Resume.
func (c *Client) Run(j Job) Report {
	c.job = j
	c.jobs = make([]*job, len(c.loops))
	for i, l := range c.loops {
		w := &job{client: c, job: j, loop: l, want: j.Flows / len(c.loops), paused: make(chan struct{}), ended: make(chan struct{})}
		if i < j.Flows%len(c.loops) {
			w.want++
		}
		w.cell.warm, w.cell.duration = int64(j.Warm), int64(j.Duration)
		c.jobs[i] = w
		l.do(func() {
			l.onEvent, l.onClosed = w.onEvent, w.onClosed
			if w.want == 0 {
				close(w.paused)
				close(w.ended)
				return
			}
			w.open()
		})
	}
	if j.Kind == Hold || j.Kind == Stall || j.Kind == Fill {
		return c.wait(func(w *job) chan struct{} { return w.paused })
	}
	return c.wait(func(w *job) chan struct{} { return w.ended })
}

// Check has each flow of a Hold do one more request.
func (c *Client) Check() Report {
	for _, w := range c.jobs {
		w.loop.do(func() {
			w.ready, w.paused = 0, make(chan struct{})
			w.each(func(f *flow) { w.request(f) })
			w.allReady()
		})
	}
	return c.wait(func(w *job) chan struct{} { return w.paused })
}

// Resume ends a Hold, a Stall or a Fill: the flows read what there is, and end.
func (c *Client) Resume() Report {
	for _, w := range c.jobs {
		w.loop.do(func() {
			w.last = true
			w.each(func(f *flow) {
				f.step = working
				f.pause(false)
				if c.job.Kind == Hold || c.job.Kind == Fill {
					w.leave(f)
				}
			})
			w.ending()
		})
	}
	return c.wait(func(w *job) chan struct{} { return w.ended })
}

// wait waits for all loops to come to a point, and reports. What has not come there in time is broken.
func (c *Client) wait(point func(*job) chan struct{}) Report {
	deadline := time.After(c.job.Duration + c.job.Limit)
	if c.job.Kind == Stall || c.job.Kind == Fill {
		// Retransmits that found no room meanwhile have backed off for long.
		deadline = time.After(stallLimit)
	}
	var cells []*cell
	for _, w := range c.jobs {
		select {
		case <-point(w):
		case <-deadline:
			deadline = time.After(0)
			w.loop.do(func() {
				w.last = true
				if n := w.want; w.ready < n && w.start == 0 {
					w.cell.fault(fmt.Errorf("%d of %d flows were not there after %v", n-w.ready, n, c.job.Duration+c.job.Limit))
				} else if w.live > 0 {
					w.cell.fault(fmt.Errorf("%d of %d flows hang", w.live, w.began))
				}
				w.each(func(f *flow) { w.loop.close(f, true) })
			})
		}
		w.loop.do(func() { cells = append(cells, w.snapshot()) })
	}
	return merge(cells)
}

// snapshot is a copy of the cell.
func (w *job) snapshot() *cell {
	c := w.cell
	c.latencies = slices.Clone(w.cell.latencies)
	return &c
}

// Look is what the client has seen so far of its job. Held is what the flows that live have sent.
func (c *Client) Look() Report {
	var cells []*cell
	held := int64(0)
	for _, w := range c.jobs {
		w.loop.do(func() {
			cells = append(cells, w.snapshot())
			w.each(func(f *flow) { held += f.tx })
		})
	}
	r := merge(cells)
	r.Held = held
	return r
}

func (w *job) each(f func(*flow)) {
	for _, fl := range w.loop.flows {
		if fl != nil && !fl.closed {
			f(fl)
		}
	}
}

// open opens flows until there are enough, or too many at once.
func (w *job) open() {
	for !w.last && w.live < w.want && w.live-w.ready < opening {
		if w.job.Kind != Connects && w.began >= w.want {
			return
		}
		w.began++
		w.cell.Flows++
		if err := w.connect(); err != nil {
			w.cell.fault(err)
			w.last = true // it would be the same with the next one
			w.ending()
			return
		}
	}
}

func (w *job) connect() error {
	j := w.job
	family := unix.AF_INET
	if j.Addr.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	if j.Kind == Stall {
		// What fills up is to be the proxy, and not this socket: before the connection, for its window's
		// scale.
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 64<<10)
	} else if j.Kind == Fill {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 64<<10)
	}
	f := &flow{loop: w.loop, cell: &w.cell, fd: fd, began: now()}
	f.cmd = stream.Command{Cell: j.Cell, Flow: w.client.next.Add(1), Size: uint32(j.Size), Warm: j.Warm, Duration: j.Duration}
	f.txPhase, f.rxPhase = stream.Phases(f.cmd.Flow)
	switch j.Kind {
	case Up:
		f.cmd.Op, f.allow, f.until = stream.Sink, forever, f.began+int64(j.Duration)
	case Down, Stall:
		f.cmd.Op = stream.Source
	case Fill:
		f.cmd.Op, f.allow = stream.Deaf, forever
	default:
		f.cmd.Op, f.allow = stream.Echo, int64(j.Size)
	}
	f.head = f.cmd.Append(slices.Concat(j.Preface, w.client.hello))
	var sa unix.Sockaddr = &unix.SockaddrInet4{Port: int(j.Addr.Port()), Addr: j.Addr.Addr().As4()}
	if family == unix.AF_INET6 {
		sa = &unix.SockaddrInet6{Port: int(j.Addr.Port()), Addr: j.Addr.Addr().As16()}
	}
	if err := unix.Connect(fd, sa); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		unix.Close(fd)
		return fmt.Errorf("connect to %v: %w", j.Addr, err)
	}
	w.live++
	if err := w.loop.add(f, unix.EPOLLIN|unix.EPOLLOUT); err != nil {
		unix.Close(fd)
		w.live--
		return err
	}
	return nil
}

// onEvent drives a flow after whatever has happened to it.
func (w *job) onEvent(f *flow) {
	w.advance(f)
	if f.closed || !f.eof {
		return
	}
	if f.step != leaving && !(w.job.Kind == Up && f.shut) {
		f.fail(errors.New("the stream ended early"))
		return
	}
	w.cell.Done++
	w.cell.Received += f.rx
	if w.job.Kind == Connects {
		w.cell.Count++
	}
	w.loop.close(f, false)
}

func (w *job) onClosed(f *flow) {
	w.live--
	if f.step == connecting {
		w.ready++ // it will never be
		w.allReady()
	}
	w.open()
	w.ending()
}

func (w *job) advance(f *flow) {
	switch w.job.Kind {
	case Up:
		if f.connected && f.step == connecting {
			f.step = working
			w.ready++
			w.open()
		}
	case Down:
		if f.connected && f.step == connecting {
			f.step = working
			w.ready++
			w.open()
		}
		if f.eof {
			w.leave(f)
		}
	case Stall:
		if f.rx > 0 && f.step == connecting {
			f.pause(true)
			w.park(f)
		}
		if f.eof && f.step == working {
			w.leave(f)
		}
	case Fill:
		if f.tx > 0 && f.step == connecting {
			w.park(f)
		}
	case Hold:
		if f.rx == f.allow && (f.step == connecting || f.step == working) {
			w.park(f)
		}
	case Requests:
		if f.rx < f.allow {
			return
		}
		switch f.step {
		case connecting:
			w.park(f)
		case working:
			t := now()
			if t >= w.start+int64(w.job.Duration) {
				w.leave(f)
				return
			}
			w.cell.latency(t - f.began)
			w.cell.Count++
			w.cell.Seconds = float64(t-w.start) / 1e9
			w.request(f)
		}
	case Connects:
		t := now()
		if w.start == 0 {
			w.start = t
		}
		if f.rx < f.allow || f.step != connecting {
			return
		}
		f.step = leaving
		w.ready++
		w.cell.latency(t - f.began)
		w.cell.Seconds = float64(t-w.start) / 1e9
		if t >= w.start+int64(w.job.Duration) {
			w.last = true
		}
		f.finish()
	}
}

func (w *job) request(f *flow) {
	f.step = working
	f.began = now()
	f.allow += int64(w.job.Size)
	f.send()
}

func (w *job) leave(f *flow) {
	if f.step != leaving {
		f.step = leaving
		f.finish()
	}
}

// park has a flow wait until all are there.
func (w *job) park(f *flow) {
	f.step = waiting
	w.ready++
	w.open()
	w.allReady()
}

func (w *job) allReady() {
	if w.ready < w.want || w.job.Kind == Connects {
		return
	}
	select {
	case <-w.paused:
		return
	default:
		close(w.paused)
	}
	if w.job.Kind == Requests {
		w.start = now()
		w.each(func(f *flow) {
			if f.step == waiting {
				w.request(f)
			}
		})
	}
}

// ending notices that nothing is left to do.
func (w *job) ending() {
	if w.live > 0 || !w.last && (w.job.Kind == Connects || w.began < w.want) {
		return
	}
	for _, c := range []chan struct{}{w.paused, w.ended} {
		select {
		case <-c:
		default:
			close(c)
		}
	}
}
