//go:build soak

package relay_test

import (
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/cable"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// TestSoak is `make soak`.
func TestSoak(t *testing.T) {
	if !cable.InOwnNetwork(t) {
		return
	}
	veth := cable.New(t, relaytest.SmallWindow)
	hands := userspaceHands(t, nil)
	for i := range hands {
		hands[i].Name += " over loopback"
		hands[i].Fast = true // a segment there is larger than a small window, which only probes open then
	}
	for _, h := range userspaceHands(t, veth) {
		h.Name += " over veth"
		hands = append(hands, h)
	}
	paths := map[string]relaytest.Path{"loopback": relaytest.Loopback{}.Path(t), "veth": relaytest.Loopback{Cable: veth}.Path(t)}
	relaytest.Soak(t, 2000, 25*time.Minute, paths, hands)
}
