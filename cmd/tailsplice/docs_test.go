package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestDocsIndex: docs/README.md leads to each page in docs. That its links are not dead is TestClaims' to say.
func TestDocsIndex(t *testing.T) {
	const docs = "../../docs"
	index, err := os.ReadFile(filepath.Join(docs, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	linked := map[string]bool{"README.md": true}
	for _, m := range regexp.MustCompile(`\]\(([^)#]+)`).FindAllStringSubmatch(string(index), -1) {
		linked[m[1]] = true
	}
	pages := 0
	err = filepath.WalkDir(docs, func(path string, _ fs.DirEntry, err error) error {
		if name, _ := filepath.Rel(docs, path); strings.HasSuffix(name, ".md") {
			pages++
			if !linked[filepath.ToSlash(name)] {
				t.Errorf("docs/%s is not in the index: add a line for it to docs/README.md", name)
			}
		}
		return err
	})
	if err != nil || pages < 10 {
		t.Errorf("%d pages were seen: %v", pages, err)
	}
}
