package tailnet_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// listenerFollows: a daemon that listens on "tailnet:PORT" follows when control gives its node other
// addresses than it has now, and comes back with them.
func listenerFollows(t *testing.T, h, visitor *lab.Host, now []netip.Prefix, give func([]netip.Prefix)) {
	d := h.Tailsplice(t, `listeners:
  - name: moving
    listen: ["tailnet:7443"]
    mode: tcp
    default: { forward: "127.0.0.1:1" }
`)
	defer d.Stop(5 * time.Second)
	moved := []netip.Prefix{netip.MustParsePrefix("100.64.77.1/32"),
		netip.MustParsePrefix("fd7a:115c:a1e0::7701/128")}
	listensOn := func(want []netip.Prefix) error {
		out, err := d.CLI(t.Context(), "status", "--json")
		if err != nil {
			return err
		}
		for _, p := range slices.Concat(now, moved) {
			addr := net.JoinHostPort(p.Addr().String(), "7443")
			wanted := slices.Contains(want, p)
			if strings.Contains(string(out), addr) != wanted {
				return fmt.Errorf("status lists %s: %v, want %v", addr, !wanted, wanted)
			}
		}
		for _, p := range want { // the accept is what counts: there is nothing behind it
			ctx, cancel := context.WithTimeout(t.Context(), patience/6)
			c, err := visitor.Dial(ctx, "tcp", net.JoinHostPort(p.Addr().String(), "7443"))
			cancel()
			if err != nil {
				return err
			}
			c.Close()
		}
		return nil
	}
	eventually(t, func() error { return listensOn(now) })
	give(moved)
	t.Logf("at its new addresses after %s", eventually(t, func() error { return listensOn(moved) }))
	give(now)
	eventually(t, func() error { return listensOn(now) })
}
