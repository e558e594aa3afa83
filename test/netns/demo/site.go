package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"image/png"
	"io"
	"net/netip"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// site is the running path.
type site struct {
	w       *lab.World
	daemons map[string]*lab.Daemon // by host
}

// seen is what the container says of a request.
type seen struct {
	Client    string `json:"client"`
	Forwarded string `json:"forwarded"`
	Peer      string `json:"peer"`
	Host      string `json:"host"`
	ID        string `json:"path_id"`
	Container string `json:"container"`
	Cloud     string `json:"cloud"`
}

// checkKeys makes sure that the edges can't decrypt what they forward: only home has a key.
func (s *site) checkKeys(ctx context.Context) error {
	for _, h := range []*lab.Host{s.w.EdgeA, s.w.EdgeB, s.w.Laptop} {
		if _, err := h.Sh(ctx, "test ! -e "+lab.KeyFile); err != nil {
			return fmt.Errorf("%s has a private key: %w", h.Name, err)
		}
	}
	return nil
}

// curl requests the site once, over the family "-4" or "-6".
func (s *site) curl(ctx context.Context, family string) (seen, error) {
	var v seen
	out, err := s.w.Client.Command(ctx, "curl", family, "-sS", "--fail-with-body", "--max-time", "20",
		"-H", "Accept: application/json", "https://"+lab.Site+"/").Output()
	if err != nil {
		return v, fmt.Errorf("%w\n%s", err, out)
	}
	if err := json.Unmarshal(out, &v); err != nil {
		return v, fmt.Errorf("%w: %s", err, out)
	}
	want := s.w.Client.IP4
	if family == "-6" {
		want = s.w.Client.IP6
	}
	var errs []error
	for _, c := range []struct{ what, got, want string }{
		{"the client's address", v.Client, want.String()}, {"the host", v.Host, lab.Site}, {"the container", v.Container, "blog"},
	} {
		if c.got != c.want {
			errs = append(errs, fmt.Errorf("the container saw %q as %s, not %q", c.got, c.what, c.want))
		}
	}
	if v.ID == "" {
		errs = append(errs, errors.New("the request came without a path id"))
	}
	if !strings.HasPrefix(v.Cloud, "Hello from the cloud") {
		errs = append(errs, fmt.Errorf("the container could not call the cloud: %s", v.Cloud))
	}
	return v, errors.Join(errs...)
}

// stop is a place on the path of a request.
type stop struct{ Name, Address, RTT, Target string }

// path is that of a request, from the log line of each hop that has the path's id.
func (s *site) path(ctx context.Context, edge *lab.Host, v seen) ([]stop, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	hops := []string{edge.Name, "home", "laptop"}
	lines := map[string]lab.LogLine{}
	for _, hop := range hops {
		l, err := s.daemons[hop].WaitLog(ctx, func(l lab.LogLine) bool { return l["msg"] == "flow ended" && l["id"] == v.ID })
		if err != nil {
			return nil, fmt.Errorf("the log of %s lacks the path %s: %w", hop, v.ID, err)
		}
		if l["node"] != hop {
			return nil, fmt.Errorf("the flow on %s calls its node %v", hop, l["node"])
		}
		lines[hop] = l
	}
	first := lines[edge.Name]
	blog, err := s.w.Docker.Addr(ctx, "blog")
	if err != nil {
		return nil, err
	}

	path := []stop{{Name: "client", Address: fmt.Sprint(first["client"]), Target: "https://" + v.Host + "/"}}
	address, rtt := s.anycast(first), milliseconds(first["downstream_rtt"])
	for _, hop := range hops {
		l := lines[hop]
		path = append(path, stop{hop, address, rtt, fmt.Sprint(l["target"])})
		address, rtt = s.upstream(l), milliseconds(l["upstream_rtt"])
	}
	if !strings.HasPrefix(address, blog.String()+":") {
		return nil, fmt.Errorf("the laptop sent the request to %s, and the container is %v", address, blog)
	}
	return append(path, stop{Name: v.Container, Address: address, RTT: rtt}), nil
}

func printPath(out io.Writer, path []stop, v seen) {
	fmt.Fprintf(out, "\n    path %s\n", v.ID)
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "    hop\taddress\tround trip\tand sends it to")
	for _, p := range path {
		fmt.Fprintf(t, "    %s\t%s\t%s\t%s\n", p.Name, p.Address, p.RTT, p.Target)
	}
	t.Flush()
	fmt.Fprintf(out, "    the container saw %s as the client, and says: %s\n\n", v.Client, v.Cloud)
}

// anycast is the address on the edge that the client reached.
func (s *site) anycast(l lab.LogLine) string {
	client, err := netip.ParseAddrPort(fmt.Sprint(l["client"]))
	if err == nil && client.Addr().Is6() {
		return netip.AddrPortFrom(lab.Anycast6, 443).String()
	}
	return netip.AddrPortFrom(lab.Anycast4, 443).String()
}

func (s *site) upstream(l lab.LogLine) string { return fmt.Sprint(l["upstream"]) }

// milliseconds prints a duration of the log, which is in seconds.
func milliseconds(v any) string {
	sec, ok := v.(float64)
	if !ok {
		return ""
	}
	return fmt.Sprintf("%.2f ms", sec*1000)
}

// browse opens the site in a real browser that trusts the lab's CA, takes a screenshot, and makes sure that
// it shows the page.
func (s *site) browse(ctx context.Context, edge *lab.Host, screenshot string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := os.Remove(screenshot); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	requests := s.requests(edge)
	if _, err := s.w.Browse(ctx, "https://"+lab.Site+"/", screenshot); err != nil {
		return err
	}
	f, err := os.Open(screenshot)
	if err != nil {
		return fmt.Errorf("no screenshot: %w", err)
	}
	defer f.Close()
	if _, err := png.Decode(f); err != nil {
		return fmt.Errorf("%s: %w", screenshot, err)
	}
	// A browser also takes pictures of its error pages.
	for s.requests(edge) == requests {
		select {
		case <-ctx.Done():
			return fmt.Errorf("no request of the browser ended well on home: see %s", screenshot)
		case <-time.After(50 * time.Millisecond):
		}
	}
	return nil
}

// requests counts the pages that home has answered with 200 for connections from the edge.
func (s *site) requests(edge *lab.Host) int {
	n := 0
	for _, l := range s.daemons["home"].LogLines() {
		peer, err := netip.ParseAddrPort(fmt.Sprint(l["downstream"]))
		if err != nil || l["status"] != 200.0 || l["path"] != "/" {
			continue
		}
		if peer.Addr() == edge.Node.IP4 || peer.Addr() == edge.Node.IP6 {
			n++
		}
	}
	return n
}
