package main

import (
	"os"
	"testing"
	"time"
)

func TestKillTimeout(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"":                                  5 * time.Second,
		"app = \"x\"\n# kill_timeout = 9\n": 5 * time.Second,
		"kill_timeout = 300\n":              300 * time.Second,
		"kill_signal='SIGTERM'\nkill_timeout='5'": 5 * time.Second,
		"kill_timeout = \"2m\"\n":                 2 * time.Minute,
		"x = 1\n  kill_timeout = \"120s\" # wait": 2 * time.Minute,
	} {
		if had := killTimeout(text); had != want {
			t.Errorf("%q: %v, want %v", text, had, want)
		}
	}
}

// TestShipped: the fly.toml that people copy leaves time to drain.
func TestShipped(t *testing.T) {
	text, err := os.ReadFile("fly.toml")
	if err != nil {
		t.Fatal(err)
	}
	if had := killTimeout(string(text)); had != 300*time.Second {
		t.Errorf("kill_timeout is %v, want 300s", had)
	}
}
