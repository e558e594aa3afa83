package conduct

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/tailsplice/tailsplice/test/bench/peers"
	"github.com/tailsplice/tailsplice/test/bench/stream"
	"github.com/tailsplice/tailsplice/test/bench/system"
)

// startTerminating starts what terminates TLS. Of ours there is only one: requests don't have a datapath in
// the kernel.
func (c *conductor) startTerminating(ctx context.Context) error {
	names := []string{"nginx"}
	if c.Caddy != "" {
		names = append(names, system.Caddy)
	} else {
		c.run.Warn("Caddy is left out of https: it isn't built (scripts/provision-bench builds it)")
	}
	if c.Baseline != "" {
		names = append(names, "baseline/userspace")
	}
	names = append(names, "tailsplice/userspace")
	names = slices.DeleteFunc(names, func(n string) bool { return n != system.Caddy && !chosen(c.Systems, n) })
	for _, n := range slices.Concat([]string{system.Direct, system.HAProxy}, names, []string{system.DirectAgain}) {
		s, err := c.builder.StartTerminating(ctx, n)
		if err != nil {
			return fmt.Errorf("https: %w", err)
		}
		c.terminating = append(c.terminating, s)
		if n == system.Caddy {
			c.run.Versions[n] = s.Version
		}
	}
	return nil
}

// https is requests by wrk over TLS 1.3, kept alive, and answers of 1 KiB, each compared with what it has to
// be.
func https(flowsName string, flows int, t test) *test {
	t.name, t.https, t.flows = "https_"+flowsName, true, flows
	t.duration, t.least = 2*time.Second, time.Second // wrk knows only whole seconds
	t.fixed = 100 * time.Millisecond
	t.run = func(ctx context.Context, c *cellRun) error {
		r, err := c.wrk(ctx, flows, c.time)
		if err != nil {
			return err
		}
		c.set("https_rate_"+flowsName, float64(r.Requests)/float64(r.Micros)*1e6)
		c.set("https_p50_"+flowsName, float64(r.P50))
		c.set("https_p99_"+flowsName, float64(r.P99))
		c.set("https_p999_"+flowsName, float64(r.P999))
		return nil
	}
	return &t
}

// wrkReport is what https-wrk.lua prints.
type wrkReport struct {
	Requests, Wrong, Errors int
	Micros                  int `json:"us"`
	P50, P99, P999          int
}

// inHosts runs a program with an /etc/hosts of its own, which has the server name: wrk takes the TLS server
// name from the URL.
const inHosts = `mount --bind "$1" /etc/hosts && shift && exec "$@"`

func (c *cellRun) wrk(ctx context.Context, flows int, d time.Duration) (r wrkReport, err error) {
	script, err := peers.Render("https-wrk.lua", map[string]string{"BODY": system.HTTPSBody})
	if err != nil {
		return r, err
	}
	hosts, lua := filepath.Join(c.conductor.Dir, "hosts"), filepath.Join(c.conductor.Dir, "https-wrk.lua")
	for file, text := range map[string]string{hosts: c.system.Addr.Addr().String() + " " + stream.ServerName + "\n", lua: script} {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			return r, err
		}
	}
	seconds := max(1, int(math.Round(d.Seconds())))
	cmd := exec.CommandContext(ctx, "unshare", "--mount", "sh", "-c", inHosts, "sh", hosts,
		"wrk", "--threads", "1", "--connections", strconv.Itoa(flows), "--duration", strconv.Itoa(seconds), "--timeout", "10s", "--script", lua,
		fmt.Sprintf("https://%s:%d/", stream.ServerName, c.system.Addr.Port()))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := c.conductor.topology.Client.Start(cmd); err != nil {
		return r, err
	}
	if err := cmd.Wait(); err != nil {
		return r, fmt.Errorf("wrk: %w: %s", err, bytes.TrimSpace(out.Bytes()))
	}
	i := bytes.LastIndexByte(out.Bytes(), '{')
	if i < 0 {
		return r, fmt.Errorf("wrk printed no result: %s", out.Bytes())
	}
	if err := json.Unmarshal(out.Bytes()[i:], &r); err != nil {
		return r, fmt.Errorf("wrk printed %q: %w", out.Bytes()[i:], err)
	}
	if r.Wrong+r.Errors > 0 || r.Requests == 0 {
		err = broken{fmt.Errorf("of %d answers %d were wrong, and there were %d errors", r.Requests, r.Wrong, r.Errors)}
	}
	return r, err
}
