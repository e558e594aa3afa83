package path

import (
	"regexp"
	"testing"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// TestTrace: asked on each hop in turn, trace leads from the edge to the container.
func TestTrace(t *testing.T) {
	s := world(t)
	for _, c := range []struct {
		hop  *lab.Daemon
		want []string
	}{
		{s.edgeA, []string{`web \(sni\)`, `default takes it`, `ok +→ tailnet://home:443 \(PROXY v2\) answers at \S+:443 after`, `next hop: node home: ask there: tailsplice trace ` + lab.Site}},
		{s.home, []string{`web \(https\)`, `default takes it`, `ok +→ tailnet://laptop:8080 answers at \S+:8080 after`, `next hop: node laptop: ask there: tailsplice trace ` + lab.Site + `/bytes`}},
		{s.laptop, []string{`web \(http\)`, `route ` + lab.Site + ` takes it`, `ok +→ docker://blog:8080 answers at 172\.\S+:8080 after`, `next hop: container blog on this host`}},
	} {
		out, err := c.hop.CLI(t.Context(), "trace", "https://"+lab.Site+"/bytes?n=1", "--listener", "web")
		if err != nil {
			t.Errorf("on %s: %v", c.hop.Host.Name, err)
		}
		for _, want := range c.want {
			if !regexp.MustCompile(want).Match(out) {
				t.Errorf("on %s it does not say %s:\n%s", c.hop.Host.Name, want, out)
			}
		}
	}
	if _, err := s.laptop.CLI(t.Context(), "trace", "nobody.example", "--listener", "web"); err == nil {
		t.Error("on the laptop nobody.example leads somewhere")
	}
}
