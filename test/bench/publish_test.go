package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/tailsplice/tailsplice/test/bench/report"
)

// TestPublished checks that README, docs and charts show one run, the recorded one.
func TestPublished(t *testing.T) {
	const root = "../.."
	r, err := report.Read(filepath.Join(root, recorded))
	if err != nil {
		t.Fatal(err)
	}
	files, err := published(root, r)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range files {
		got, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s does not show %s: run `make bench-docs`", name, recorded)
		}
	}
}
