package lab

import (
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// cable is a link with a delay, for kernels without netem: two L3 TUN devices in two hosts, and this process
// between.
type cable struct {
	ends          [2]*os.File
	delay, jitter atomic.Int64 // ns
	pumps         sync.WaitGroup
}

// packet is on its way through a cable. TUN devices are made with the default MTU of 1500.
type packet struct {
	due  time.Time
	data *[2048]byte
	n    int
}

// cableQueue is how many packets a direction of a cable holds: 100 ms at 1 Gbit/s of full packets, and some.
const cableQueue = 1 << 14

func newCable(a *Host, aDev string, b *Host, bDev string) (_ *cable, err error) {
	c := &cable{}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	for i, e := range []struct {
		h   *Host
		dev string
	}{{a, aDev}, {b, bDev}} {
		if c.ends[i], err = e.h.tun(e.dev); err != nil {
			return nil, err
		}
		if err := e.h.setLink(e.dev, true); err != nil {
			return nil, err
		}
	}
	c.pump(c.ends[0], c.ends[1])
	c.pump(c.ends[1], c.ends[0])
	return c, nil
}

func (c *cable) set(delay, jitter time.Duration) {
	c.delay.Store(int64(delay))
	c.jitter.Store(int64(jitter))
}

func (c *cable) close() {
	for _, f := range c.ends {
		if f != nil {
			f.Close()
		}
	}
	c.pumps.Wait()
}

// pump carries packets one way until an end is closed.
func (c *cable) pump(from, to *os.File) {
	queue := make(chan packet, cableQueue)
	pool := sync.Pool{New: func() any { return new([2048]byte) }}
	c.pumps.Go(func() { // reads
		defer close(queue)
		var last time.Time
		for {
			b := pool.Get().(*[2048]byte)
			n, err := from.Read(b[:])
			if err != nil {
				return
			}
			d := time.Duration(c.delay.Load())
			if j := c.jitter.Load(); j > 0 {
				d += time.Duration(rand.Int64N(2*j+1) - j)
			}
			due := time.Now().Add(d)
			if due.Before(last) {
				due = last // order is kept
			}
			last = due
			select {
			case queue <- packet{due, b, n}:
			default: // a full queue drops its tail
			}
		}
	})
	c.pumps.Go(func() { // writes
		runtime.LockOSThread() // for nanosleep: Go's own timers may be a millisecond late
		defer runtime.UnlockOSThread()
		for p := range queue {
			if d := time.Until(p.due); d > 0 {
				ts := unix.NsecToTimespec(int64(d))
				unix.Nanosleep(&ts, nil)
			}
			to.Write(p.data[:p.n]) // EIO: that end is down, and the packet lost
			pool.Put(p.data)
		}
	})
}

// tun makes an L3 TUN device in the host. The file reads and writes one IP packet at a time; closing it
// removes the device.
func (h *Host) tun(dev string) (f *os.File, err error) {
	err = h.inNet(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		var ifr struct {
			name  [unix.IFNAMSIZ]byte
			flags uint16
			_     [22]byte
		}
		copy(ifr.name[:unix.IFNAMSIZ-1], dev)
		ifr.flags = unix.IFF_TUN | unix.IFF_NO_PI
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETIFF, uintptr(unsafe.Pointer(&ifr))); errno != 0 {
			unix.Close(fd)
			return errno
		}
		// in Go's poller only now: before TUNSETIFF a TUN can't be polled
		f = os.NewFile(uintptr(fd), "/dev/net/tun")
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("%s: make TUN device %s: %w", h.Name, dev, err)
	}
	return f, nil
}
