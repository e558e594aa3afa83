package loader

import (
	"sync"

	"golang.org/x/sys/unix"
)

const (
	maxPipe  = 1 << 20  // bytes; what an unprivileged process may ask for (fs.pipe-max-size)
	minPipe  = 64 << 10 // bytes; a smaller one is worse than copying
	maxPipes = 64       // kept for the next half
)

// A pipe carries bytes from socket to socket. userspace/relay has one too, and the two may not import each other.
type pipe struct {
	r, w int
	size int // bytes
}

var pipes struct {
	sync.Mutex
	free []*pipe
}

// getPipe gives an empty pipe, or nil when there is none to be had.
func getPipe() *pipe {
	pipes.Lock()
	if n := len(pipes.free); n > 0 {
		p := pipes.free[n-1]
		pipes.free = pipes.free[:n-1]
		pipes.Unlock()
		return p
	}
	pipes.Unlock()
	var fds [2]int
	if unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK) != nil {
		return nil
	}
	p := &pipe{r: fds[0], w: fds[1]}
	p.size, _ = unix.FcntlInt(uintptr(p.w), unix.F_SETPIPE_SZ, maxPipe)
	if p.size <= 0 { // the user has too many pages in pipes
		p.size, _ = unix.FcntlInt(uintptr(p.w), unix.F_GETPIPE_SZ, 0)
	}
	if p.size < minPipe {
		p.close()
		return nil
	}
	return p
}

// release takes the pipe back, which n bytes are in.
func (p *pipe) release(n int) {
	pipes.Lock()
	defer pipes.Unlock()
	if n == 0 && len(pipes.free) < maxPipes {
		pipes.free = append(pipes.free, p)
		return
	}
	p.close()
}

func (p *pipe) close() {
	_ = unix.Close(p.r)
	_ = unix.Close(p.w)
}

// fill takes up to n bytes from s.
func (p *pipe) fill(s socket, n int) (int, error) { return move(int(s), p.w, n) }

// drain gives up to n bytes to s.
func (p *pipe) drain(s socket, n int) (int, error) { return move(p.r, int(s), n) }

func move(from, to, n int) (int, error) {
	for {
		n, err := unix.Splice(from, nil, to, nil, n, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		if err != unix.EINTR {
			return max(int(n), 0), err
		}
	}
}
