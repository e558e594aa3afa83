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

// A pipePool keeps empty pipes, and counts all.
type pipePool struct {
	mu sync.Mutex
	// +checklocks:mu
	free []*pipe
	// +checklocks:mu
	all int // pipes, free or in use
	// +checklocks:mu
	limit int // 0: none
}

// LimitPipes says how many pipes, of two descriptors each, r may have. Those that a reader who has stopped
// keeps full count: without one, bytes are copied.
func (r *Relay) LimitPipes(n int) {
	r.pipes.mu.Lock()
	defer r.pipes.mu.Unlock()
	r.pipes.limit = n
}

// get gives an empty pipe, or nil when there is none to be had.
func (pool *pipePool) get() *pipe {
	pool.mu.Lock()
	if n := len(pool.free); n > 0 {
		p := pool.free[n-1]
		pool.free = pool.free[:n-1]
		pool.mu.Unlock()
		return p
	}
	if pool.limit > 0 && pool.all >= pool.limit {
		pool.mu.Unlock()
		return nil
	}
	pool.all++
	pool.mu.Unlock()
	var fds [2]int
	if unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK) != nil {
		pool.uncount()
		return nil
	}
	p := &pipe{r: fds[0], w: fds[1]}
	p.size, _ = unix.FcntlInt(uintptr(p.w), unix.F_SETPIPE_SZ, maxPipe)
	if p.size <= 0 { // the user has too many pages in pipes
		p.size, _ = unix.FcntlInt(uintptr(p.w), unix.F_GETPIPE_SZ, 0)
	}
	if p.size < minPipe {
		pool.close(p)
		return nil
	}
	return p
}

// put takes an empty pipe back.
func (pool *pipePool) put(p *pipe) {
	pool.mu.Lock()
	if len(pool.free) < maxPipes {
		pool.free = append(pool.free, p)
		pool.mu.Unlock()
		return
	}
	pool.mu.Unlock()
	pool.close(p)
}

// close closes a pipe, which may have bytes in it.
func (pool *pipePool) close(p *pipe) {
	unix.Close(p.r)
	unix.Close(p.w)
	pool.uncount()
}

func (pool *pipePool) uncount() {
	pool.mu.Lock()
	defer pool.mu.Unlock()
	pool.all--
}

// drop closes the pipes that are kept.
func (pool *pipePool) drop() {
	pool.mu.Lock()
	free := pool.free
	pool.free = nil
	pool.mu.Unlock()
	for _, p := range free {
		pool.close(p)
	}
}
