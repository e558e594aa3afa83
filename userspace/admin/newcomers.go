package admin

import (
	"container/list"
	"net"
	"sync"
)

// maxConnections is how many connections may be open to the metrics, and to /healthz and /readyz.
const maxConnections = 128

// newcomers is a listener with room for so many connections. One more takes the place of the oldest, which is
// closed: a client that asks has its answer within milliseconds, so the oldest does not ask.
type newcomers struct {
	net.Listener
	room int

	mu sync.Mutex
	// +checklocks:mu
	open list.List // of *guest, the oldest first
}

// LimitConnections bounds the connections of ln such that a newcomer always has a place.
func LimitConnections(ln net.Listener) net.Listener {
	return &newcomers{Listener: ln, room: maxConnections}
}

func (n *newcomers) Accept() (net.Conn, error) {
	conn, err := n.Listener.Accept()
	if err != nil {
		return nil, err
	}
	g := &guest{Conn: conn, of: n}
	n.mu.Lock()
	var oldest *guest
	if n.open.Len() >= n.room {
		oldest = n.open.Remove(n.open.Front()).(*guest)
		oldest.place = nil
	}
	g.place = n.open.PushBack(g)
	n.mu.Unlock()
	if oldest != nil {
		oldest.Close()
	}
	return g, nil
}

// guest is one of the connections. of.mu guards place, which is nil once another has it.
type guest struct {
	net.Conn
	of    *newcomers
	place *list.Element
}

func (g *guest) Close() error {
	g.of.mu.Lock()
	if g.place != nil {
		g.of.open.Remove(g.place)
		g.place = nil
	}
	g.of.mu.Unlock()
	return g.Conn.Close()
}
