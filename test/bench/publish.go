package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/tailsplice/tailsplice/test/bench/report"
)

// published are the files of the repository that show a run, with their new contents. In pages the run stands
// between the comments <!-- bench NAME --> and <!-- end -->.
func published(root string, r *report.Run) (map[string][]byte, error) {
	var chart, short, table bytes.Buffer
	r.Chart(&chart)
	r.ShortChart(&short)
	r.Markdown(&table)
	files := map[string][]byte{"docs/bench.svg": chart.Bytes(), "docs/bench-short.svg": short.Bytes()}
	for _, p := range []struct{ file, name, text string }{
		{"README.md", "headline", r.Headline() + "."},
		{"docs/benchmarks.md", "table", table.String()},
	} {
		b, err := os.ReadFile(filepath.Join(root, p.file))
		if err != nil {
			return nil, err
		}
		begin := fmt.Sprintf("<!-- bench %s -->\n", p.name)
		head, rest, found := strings.Cut(string(b), begin)
		_, tail, ended := strings.Cut(rest, "<!-- end -->")
		if !found || !ended {
			return nil, fmt.Errorf("%s lacks %q or its <!-- end -->", p.file, strings.TrimSpace(begin))
		}
		files[p.file] = []byte(head + begin + strings.TrimSpace(p.text) + "\n<!-- end -->" + tail)
	}
	return files, nil
}

// publish writes a run, kept in the repository, into the pages and charts that show it.
func publish(root string) error {
	r, err := report.Read(filepath.Join(root, recorded))
	if err != nil {
		return err
	}
	files, err := published(root, r)
	if err != nil {
		return err
	}
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(root, name), b, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// recorded is the run that README and docs show.
const recorded = "test/bench/recorded.json"
