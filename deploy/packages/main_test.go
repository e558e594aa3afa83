package main

import (
	"os/exec"
	"testing"
	"time"
)

// TestDebianVersion: versions are in dpkg's order, and dpkg takes them.
func TestDebianVersion(t *testing.T) {
	r := release{time: time.Unix(1700000000, 0).UTC()}
	last := ""
	for _, c := range []struct{ describe, want string }{
		{"1234567890ab", "0~20231114221320.1234567890ab"},
		{"da53cd6a16ad-dirty", "0~20231114221320.da53cd6a16ad.dirty"},
		{"v0.9.0", "0.9.0"},
		{"v1.0.0-rc.1", "1.0.0~rc.1"},
		{"v1.0.0-rc.1-2-gda53cd6a16ad", "1.0.0~rc.1+2.gda53cd6a16ad"},
		{"v1.0.0-rc.2", "1.0.0~rc.2"},
		{"v1.0.0", "1.0.0"},
		{"v1.0.0-12-gda53cd6a16ad", "1.0.0+12.gda53cd6a16ad"},
		{"v1.0.1", "1.0.1"},
	} {
		r.version = c.describe
		had := r.debianVersion()
		if had != c.want {
			t.Errorf("%s: %s, want %s", c.describe, had, c.want)
		}
		if last != "" {
			if out, err := exec.Command("dpkg", "--compare-versions", last, "lt", had).CombinedOutput(); err != nil {
				t.Errorf("dpkg has %s not before %s: %v %s", last, had, err, out)
			}
		}
		last = had
	}
}
