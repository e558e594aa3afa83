package main

import (
	"os"
	"os/exec"
	"path/filepath"
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

// TestForget: what SHA256SUMS names goes before the next packages come, and nothing else does.
func TestForget(t *testing.T) {
	dir := t.TempDir()
	if err := forget(dir); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"old.deb": "", "other": "", "SHA256SUMS": "00  old.deb\n00  gone.deb\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := forget(dir); err != nil {
		t.Fatal(err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(left) != 2 {
		t.Errorf("%v are left (%v), want other and SHA256SUMS", left, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "SHA256SUMS"), []byte("00  ../x\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := forget(dir); err == nil {
		t.Error("a file of another folder would be removed")
	}
}
