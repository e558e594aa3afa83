package datapath

import (
	"testing"

	"github.com/tailsplice/tailsplice/test/cable"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// TestPrograms runs random programs of both ends in the hands that the kernel datapaths are, and between them
// and userspace.
func TestPrograms(t *testing.T) {
	if !cable.InOwnNetwork(t) {
		return
	}
	veth, lossy := cable.New(t, relaytest.SmallWindow), cable.New(t, relaytest.SmallWindow)
	lossy.Lose(t, 0.01)
	inAtOnce, usual := load(t), load(t)
	hands := append(sockmapHands(t, veth, inAtOnce, usual), localHands(t, veth)...)
	for _, h := range sockmapHands(t, lossy, inAtOnce, usual) {
		if !h.Alone && h.Most == 0 { // which is over loopback, or takes too long to talk
			h.Name, h.Path = h.Name+", where packets are lost", relaytest.Lossy(h.Path)
			hands = append(hands, h)
		}
	}
	relaytest.RunPrograms(t, hands, relaytest.SomePrograms())
}
