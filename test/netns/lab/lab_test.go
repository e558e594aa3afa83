package lab_test

import (
	"testing"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

func TestTopology(t *testing.T) {
	w := lab.Start(t, lab.Options{NoTailnet: true, NoAnycast: true, NoDocker: true})
	out, err := w.Client.Sh(t.Context(), "ip -br addr; ip route; hostname; cat /etc/hosts; ping -c1 -W1 198.51.100.34 || true")
	t.Log(out, err)
}
