package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A sourceCount is what a source has seen since it began.
type sourceCount struct {
	Stopped       int64 // flows that stand still, now
	StoppedReset  int64 // such flows that were ended
	StoppedRefuse int64 // such connections that did not become flows

	Idle        int64 // flows that were begun
	IdleRefused int64 // connections that did not become one
	IdleAlive   int64 // of Idle, now

	Hellos        int64 // connections with a half of a hello
	HellosFailed  int64 // that could not be made, within helloDial
	HellosEnded   int64 // by the edge
	HellosSkipped int64 // not tried, because too many connects were under way
}

// A visitor opens connections to edge from one address.
type visitor struct {
	dialer net.Dialer
	edge   string
	line   float64 // that it has, in bytes a second; 0: any
}

func newVisitor(from, edge string) *visitor {
	return &visitor{dialer: net.Dialer{
		LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)},
		Timeout:   time.Minute,
		Control: func(_, _ string, c syscall.RawConn) error {
			return c.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1) })
		},
	}, edge: edge}
}

// open connects, and sends the first part of a hello for name: all of it where part is 1.
func (v *visitor) open(name string, part float64) (*net.TCPConn, error) {
	conn, err := v.dialer.Dial("tcp4", v.edge)
	if err != nil {
		return nil, err
	}
	c := conn.(*net.TCPConn)
	hello := hello(name)
	if _, err := c.Write(hello[:int(float64(len(hello))*part)]); err != nil {
		abort(c)
		return nil, err
	}
	return c, nil
}

// ask opens a flow to name, and waits for its first byte.
func (v *visitor) ask(name string, timeout time.Duration) (*net.TCPConn, error) {
	c, err := v.open(name, 1)
	if err != nil {
		return nil, err
	}
	c.SetReadDeadline(time.Now().Add(timeout))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		abort(c)
		return nil, err
	}
	return c, nil
}

// abort closes c with a reset, which leaves nothing behind here.
func abort(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}

// hellos are those of hello, by name.
var hellos sync.Map

// hello is the ClientHello for name.
func hello(name string) []byte {
	if b, ok := hellos.Load(name); ok {
		return b.([]byte)
	}
	var r recorder
	tls.Client(&r, &tls.Config{ServerName: name, InsecureSkipVerify: true}).Handshake()
	b, _ := hellos.LoadOrStore(name, r.written)
	return b.([]byte)
}

// recorder is a connection that keeps what is written, and has nothing to read.
type recorder struct {
	net.Conn
	written []byte
}

func (r *recorder) Write(b []byte) (int, error) {
	r.written = append(r.written, b...)
	return len(b), nil
}
func (r *recorder) Read([]byte) (int, error)        { return 0, io.EOF }
func (r *recorder) Close() error                    { return nil }
func (r *recorder) SetDeadline(time.Time) error     { return nil }
func (r *recorder) SetReadDeadline(time.Time) error { return nil }
func (r *recorder) SetWriteDeadline(time.Time) error {
	return nil
}

// source does as standard input says, a line each, until that ends. args are its address, its number, and the
// edge's address with port.
//
//	stopped N    keep N flows open whose both ends send what they can, and read nothing
//	again S      when such a flow ends, or is refused, open it again after S seconds or so
//	idle N       open N flows that do nothing
//	hellos R     send R halves of hellos a second; 0: no more, and close those that wait
//	count        print what there was, a sourceCount
func source(args []string) error {
	if len(args) != 3 {
		return errors.New("source ADDRESS NUMBER EDGE")
	}
	raiseFiles()
	s := &attacker{visitor: newVisitor(args[0], args[2]), number: args[1]}
	fmt.Println("ready")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		word, rest, _ := strings.Cut(in.Text(), " ")
		var n float64
		fmt.Sscan(rest, &n)
		switch word {
		case "stopped":
			for range int(n) {
				go s.stop()
			}
		case "again":
			s.again = time.Duration(n * float64(time.Second))
		case "idle":
			go s.idle(int(n))
		case "hellos":
			if s.endHellos != nil {
				s.endHellos()
			}
			var ctx context.Context
			if ctx, s.endHellos = context.WithCancel(context.Background()); n > 0 {
				go s.sendHellos(ctx, n)
			}
		case "count":
			json.NewEncoder(os.Stdout).Encode(s.counts())
		}
	}
	return nil
}

// attacker is a visitor who means the edge harm.
type attacker struct {
	*visitor
	number    string
	again     time.Duration
	endHellos context.CancelFunc
	dialing   atomic.Int64

	stopped, stoppedReset, stoppedRefused                  atomic.Int64
	idleRefused                                            atomic.Int64
	hellosBegun, hellosFailed, hellosEnded, hellosNotTried atomic.Int64

	mu   sync.Mutex
	kept []*net.TCPConn // flows that do nothing
}

func (s *attacker) counts() sourceCount {
	s.mu.Lock()
	defer s.mu.Unlock()
	alive := int64(0)
	for _, c := range s.kept {
		control(c, func(fd int) {
			if i, err := unix.GetsockoptTCPInfo(fd, unix.SOL_TCP, unix.TCP_INFO); err == nil && i.State == 1 {
				// TCP_ESTABLISHED
				alive++
			}
		})
	}
	return sourceCount{
		s.stopped.Load(), s.stoppedReset.Load(), s.stoppedRefused.Load(),
		int64(len(s.kept)), s.idleRefused.Load(), alive,
		s.hellosBegun.Load(), s.hellosFailed.Load(), s.hellosEnded.Load(), s.hellosNotTried.Load(),
	}
}

// stop keeps one flow open that stands still.
func (s *attacker) stop() {
	v := *s.visitor
	setNoPort := v.dialer.Control
	v.dialer.Control = func(network, addr string, c syscall.RawConn) error {
		c.Control(func(fd uintptr) {
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, smallQueue)
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, smallQueue)
		})
		return setNoPort(network, addr, c)
	}
	for {
		c, err := v.ask("stop.test", time.Minute)
		if err != nil {
			s.stoppedRefused.Add(1)
		} else {
			s.stopped.Add(1)
			writeOn(c)
			s.stopped.Add(-1)
			s.stoppedReset.Add(1)
		}
		time.Sleep(s.again/2 + rand.N(s.again))
	}
}

// idle opens n flows, eight at a time.
func (s *attacker) idle(n int) {
	var left atomic.Int64
	left.Store(int64(n))
	for range 8 {
		go func() {
			for left.Add(-1) >= 0 {
				c, err := s.ask("idle"+s.number+".test", time.Minute)
				if err != nil {
					s.idleRefused.Add(1)
					continue
				}
				s.mu.Lock()
				s.kept = append(s.kept, c)
				s.mu.Unlock()
			}
		}()
	}
}

const (
	mostDialing = 5000            // connects under way of one source
	helloDial   = 2 * time.Second // that one may take
)

// sendHellos sends so many halves of hellos a second until ctx is done. Who waits for the rest is the edge.
func (s *attacker) sendHellos(ctx context.Context, rate float64) {
	v := *s.visitor
	v.dialer.Timeout = helloDial
	began := time.Now()
	for n := 0; ; n++ {
		time.Sleep(time.Until(began.Add(time.Duration(float64(n) / rate * float64(time.Second)))))
		select {
		case <-ctx.Done():
			return
		default:
		}
		if s.dialing.Load() >= mostDialing {
			s.hellosNotTried.Add(1)
			continue
		}
		s.dialing.Add(1)
		go func() {
			c, err := v.open("ping.test", 0.5)
			s.dialing.Add(-1)
			if err != nil {
				s.hellosFailed.Add(1)
				return
			}
			s.hellosBegun.Add(1)
			defer context.AfterFunc(ctx, func() { abort(c) })()
			c.Read(make([]byte, 1))
			s.hellosEnded.Add(1)
			abort(c)
		}()
	}
}
