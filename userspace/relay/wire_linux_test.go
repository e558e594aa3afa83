package relay_test

import (
	"os"
	"testing"

	"github.com/tailsplice/tailsplice/userspace/relay/relaytest"
)

func TestWire(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	relaytest.RunWire(t, relaytest.Loopback{})
}
