//go:build soak

package relay_test

import (
	"os"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/cable"
	"github.com/tailsplice/tailsplice/userspace/relay"
	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

// TestSoak is `make soak`. In the environment SOAK_ROUNDS says how many, and SOAK_ONLY, a regular expression,
// which cases of a round.
func TestSoak(t *testing.T) {
	if !cable.InOwnNetwork(t) {
		return
	}
	// With buffers of the usual size the flows whose readers have stopped fill the memory that the machine
	// has for TCP. It then drops what comes, and tries again after pauses that double up to two minutes:
	// flows stand still, through any proxy.
	for _, buffers := range []string{"tcp_rmem", "tcp_wmem"} {
		cable.Sysctl(t, "ipv4/"+buffers, "4096 65536 1048576")
	}
	veth := cable.New(t, relaytest.SmallWindow)
	s := relaytest.Soak{
		Rounds: 2000,
		Limit:  time.Hour,
		Hands:  userspaceHands(t, nil),
		Paths: map[string]relaytest.Path{
			"loopback": relaytest.Loopback{}.Path(t),
			"veth":     relaytest.Loopback{Cable: veth}.Path(t),
		},
		Watchdog: &relaytest.Watchdog{
			Describe: relay.Describe,
			Networks: map[string]func(func() error) error{
				"near": func(f func() error) error { return f() },
				"far":  veth.AtFar,
			},
		},
	}
	for i := range s.Hands {
		s.Hands[i].Name += " over loopback"
		s.Hands[i].Fast = true // a segment there is larger than a small window, which only probes open then
	}
	for _, h := range userspaceHands(t, veth) {
		h.Name += " over veth"
		s.Hands = append(s.Hands, h)
	}
	if n, err := strconv.Atoi(os.Getenv("SOAK_ROUNDS")); err == nil {
		s.Rounds = n
	}
	if only := os.Getenv("SOAK_ONLY"); only != "" {
		s.Only = regexp.MustCompile(only)
	}
	s.Run(t)
}
