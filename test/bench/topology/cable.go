package topology

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A cable carries packets between two TUN devices with a delay. Packets are handed on as the kernel gives
// them, unsegmented and with their virtio header, so that it carries several Gbit/s on little CPU.
type cable struct {
	ends  [2]*os.File
	delay time.Duration
	done  sync.WaitGroup
}

const (
	virtioHeader = 10
	maxPacket    = virtioHeader + 65536
	cableQueue   = 64 << 20 // bytes each way; more is lost: far more than 60 ms of what it carries
)

func newCable(a *namespace, aDev string, b *namespace, bDev string, delay time.Duration) (*cable, error) {
	c := &cable{delay: delay}
	for i, e := range []struct {
		on  *namespace
		dev string
	}{{a, aDev}, {b, bDev}} {
		err := e.on.do(func() (err error) { c.ends[i], err = openTUN(e.dev); return err })
		if err != nil {
			c.close()
			return nil, fmt.Errorf("%s: %w", e.dev, err)
		}
	}
	c.done.Add(4)
	for i := range c.ends {
		go c.carry(c.ends[i], c.ends[1-i])
	}
	return c, nil
}

func openTUN(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err == nil {
		err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	// Only now: Go's poller would get nothing of a file that had no device yet.
	return os.NewFile(uintptr(fd), "/dev/net/tun"), nil
}

type packet struct {
	due  time.Time
	data []byte
}

var packets = sync.Pool{New: func() any { return new([maxPacket]byte) }}

// carry is one direction.
func (c *cable) carry(from, to *os.File) {
	defer c.done.Done()
	queue := make(chan packet, cableQueue/65536*16)
	go func() {
		defer c.done.Done()
		for p := range queue {
			time.Sleep(time.Until(p.due))
			to.Write(p.data)
			packets.Put((*[maxPacket]byte)(unsafe.Pointer(unsafe.SliceData(p.data))))
		}
	}()
	defer close(queue)
	for {
		b := packets.Get().(*[maxPacket]byte)
		n, err := from.Read(b[:])
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err != nil || n <= virtioHeader {
			packets.Put(b)
			continue
		}
		select {
		case queue <- packet{time.Now().Add(c.delay), b[:n]}:
		default:
			packets.Put(b)
		}
	}
}

func (c *cable) close() {
	for _, f := range c.ends {
		if f != nil {
			f.Close()
		}
	}
	c.done.Wait()
}
