package tcpsock

import (
	"net"
	"testing"
)

// TestSocketsOfOthers: another server's connection is not ended, though its peer has the address and port of one of ours.
func TestSocketsOfOthers(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	at := AddrPortOf(ln.Addr())
	c, err := net.Dial("tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write(make([]byte, 32<<10)); err != nil { // which nobody reads
		t.Fatal(err)
	}
	diag, err := OpenDiag()
	if err != nil {
		t.Fatal(err)
	}
	defer diag.Close()
	for _, v := range []struct {
		ports []uint16
		ours  bool
	}{{[]uint16{at.Port() - 1}, false}, {[]uint16{at.Port()}, true}, {[]uint16{at.Port(), 1}, true}, {[]uint16{1, 2}, false}} {
		ports := map[uint16]bool{}
		for _, p := range v.ports {
			ports[p] = true
		}
		sockets, err := diag.At(ports)
		s, ok := sockets[AddrPortOf(c.LocalAddr())]
		if err != nil || ok != v.ours || ok && s.Held < 32<<10 {
			t.Errorf("at ports %d: %v, %+v, %v", v.ports, ok, s, err)
		}
	}
}
