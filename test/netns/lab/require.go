package lab

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

const pollInterval = 50 * time.Millisecond

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// Require skips the test, naming what lacks, where the machine can't run a world of these options, or other
// tools that the test needs. Under CI=true it fails instead.
func Require(tb testing.TB, o Options, tools ...string) {
	tb.Helper()
	lacks := Lacks(o, tools...)
	if len(lacks) == 0 {
		return
	}
	msg := "lab: this machine lacks " + strings.Join(lacks, ", ") + "; run scripts/provision as root, and the tests as root"
	if os.Getenv("CI") == "true" {
		tb.Fatal(msg)
	}
	tb.Skip(msg)
}

// Lacks names what the machine lacks for a world of these options.
func Lacks(o Options, tools ...string) []string {
	var lacks []string
	if os.Getuid() != 0 {
		lacks = append(lacks, "root")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil && (!o.NoTailnet || len(o.Cables) > 0) {
		lacks = append(lacks, "/dev/net/tun")
	}
	if _, err := exec.LookPath("go"); err != nil {
		lacks = append(lacks, "go")
	}
	tools = append(tools, "nft")
	if !o.NoAnycast {
		tools = append(tools, "bird", "birdc")
	}
	if !o.NoDocker {
		tools = append(tools, "dockerd", "containerd", "iptables")
	}
	for _, t := range tools {
		if !strings.Contains(lookPath(t), "/") {
			lacks = append(lacks, t)
		}
	}
	return lacks
}
