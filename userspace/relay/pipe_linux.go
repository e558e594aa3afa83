package relay

import (
	"sync"

	"golang.org/x/sys/unix"
)

const (
	maxPipe  = 1 << 20  // bytes; what an unprivileged process may ask for (fs.pipe-max-size)
	minPipe  = 64 << 10 // bytes; a smaller one is worse than copying
	maxPipes = 64       // kept for the next flow
)

// A pipe carries bytes from socket to socket.
type pipe struct {
	r, w int
	size int // bytes
}

var pipes struct {
	sync.Mutex
	free  []*pipe
	all   int // that there are
	limit int // 0: none
}

// LimitPipes says how many pipes, of two descriptors each, the process may have. Those that a reader who has
// stopped keeps full count: without one, bytes are copied.
func LimitPipes(n int) {
	pipes.Lock()
	defer pipes.Unlock()
	pipes.limit = n
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
	if pipes.limit > 0 && pipes.all >= pipes.limit {
		pipes.Unlock()
		return nil
	}
	pipes.all++
	pipes.Unlock()
	var fds [2]int
	if unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK) != nil {
		uncountPipe()
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

// putPipe takes an empty pipe back.
func putPipe(p *pipe) {
	pipes.Lock()
	if len(pipes.free) < maxPipes {
		pipes.free = append(pipes.free, p)
		pipes.Unlock()
		return
	}
	pipes.Unlock()
	p.close()
}

func (p *pipe) close() {
	unix.Close(p.r)
	unix.Close(p.w)
	uncountPipe()
}

func uncountPipe() {
	pipes.Lock()
	defer pipes.Unlock()
	pipes.all--
}
