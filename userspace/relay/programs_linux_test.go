package relay_test

import (
	"testing"

	"github.com/tailsplice/tailsplice/test/cable"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// TestPrograms runs random programs of both ends in all hands that userspace has.
func TestPrograms(t *testing.T) {
	if cable.InOwnNetwork(t) {
		relaytest.RunPrograms(t, programHands(t), relaytest.SomePrograms())
	}
}

// TestProgramsDirect holds the oracle to the truth: whatever TCP does with nobody in between, it allows.
func TestProgramsDirect(t *testing.T) {
	if !cable.InOwnNetwork(t) {
		return
	}
	direct := func(c relaytest.Cable) relaytest.Path { return relaytest.Loopback{Cable: c}.Direct(t) }
	relaytest.RunPrograms(t, []relaytest.Hands{
		{Name: "loopback", Path: direct(nil), Fast: true},
		{Name: "veth", Path: direct(cable.New(t, relaytest.SmallWindow))},
		{Name: "veth that loses packets", Path: relaytest.Lossy(direct(losing(t)))},
	}, relaytest.SomePrograms())
}

// losing is a cable that loses one packet of a hundred.
func losing(t *testing.T) *cable.Cable {
	c := cable.New(t, relaytest.SmallWindow)
	c.Lose(t, 0.01)
	return c
}

func programHands(t *testing.T) (hands []relaytest.Hands) {
	veth := cable.New(t, relaytest.SmallWindow)
	for name, p := range map[string]relaytest.Path{
		"loopback":                relaytest.Loopback{}.Path(t),
		"veth":                    relaytest.Loopback{Cable: veth}.Path(t),
		"veth that loses packets": relaytest.Lossy(relaytest.Loopback{Cable: losing(t)}.Path(t)),
	} {
		h := relaytest.Hands{Name: "as shipped over " + name, Path: p, Fast: name == "loopback", Usual: true}
		hands = append(hands, h)
	}
	for _, h := range userspaceHands(t, nil) {
		h.Name += " over loopback"
		h.Fast = true // a segment there is larger than a small window, which only probes open then
		hands = append(hands, h)
	}
	for _, h := range userspaceHands(t, veth) {
		h.Name += " over veth"
		hands = append(hands, h)
	}
	return hands
}
