package userspace

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// measures is in the tests of a package that has to run alone: they ask what CPU time or memory was used, or how much
// there is of something at a moment, or they load programs into the kernel. Benchmarks may: nobody runs them with the
// tests.
var measures = regexp.MustCompile(`(?m)Getrusage|ReadMemStats|NumGoroutine|/proc/meminfo|smaps|/net/tcp"|` +
	`^\t"github\.com/(cilium/ebpf|tailsplice/tailsplice/loader)`)

// TestAlone: scripts/test runs alone what has to run alone.
func TestAlone(t *testing.T) {
	script, err := os.ReadFile("../scripts/test")
	if err != nil {
		t.Fatal(err)
	}
	list := regexp.MustCompile(`(?m)^alone='(.*)'$`).FindSubmatch(script)
	if list == nil {
		t.Fatal("scripts/test has no list")
	}
	alone := regexp.MustCompile("^(" + string(list[1]) + ")$")
	out, err := exec.Command("go", "list", "-f", "{{.ImportPath}} {{.Dir}}", module+"...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	for line := range strings.Lines(string(out)) {
		path, dir, _ := strings.Cut(strings.TrimSpace(line), " ")
		path = strings.TrimPrefix(path, module)
		files, _ := filepath.Glob(filepath.Join(dir, "*_test.go"))
		files = slices.DeleteFunc(files, func(f string) bool { return filepath.Base(f) == "bench_test.go" || filepath.Base(f) == "alone_test.go" })
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if what := measures.Find(text); what != nil && !alone.MatchString(path) {
				t.Errorf("%s has %s: scripts/test has to run %s alone", filepath.Base(file), what, path)
			}
		}
	}
}
