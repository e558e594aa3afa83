package filestamp

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestSame: whatever is done to a file is seen, and nothing else.
func TestSame(t *testing.T) {
	then := time.Unix(1e9, 0)
	for name, c := range map[string]struct {
		change func(file string) error
		same   bool
	}{
		"nothing": {func(string) error { return nil }, true},
		"touched": {func(file string) error { return os.Chtimes(file, then, then.Add(1)) }, false},
		"longer": {func(file string) error {
			if err := os.WriteFile(file, []byte("xx"), 0o600); err != nil {
				return err
			}
			return os.Chtimes(file, then, then)
		}, false},
		"permissions": {func(file string) error { return os.Chmod(file, 0o400) }, false},
		"replaced": {func(file string) error {
			if err := os.Rename(file, file+".old"); err != nil {
				return err
			}
			if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
				return err
			}
			return os.Chtimes(file, then, then)
		}, false},
		"removed": {os.Remove, false},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "file")
			if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chtimes(file, then, then); err != nil {
				t.Fatal(err)
			}
			before, _ := os.Stat(file)
			if err := c.change(file); err != nil {
				t.Fatal(err)
			}
			after, _ := os.Stat(file)
			if Same(before, after) != c.same || Same(after, before) != c.same {
				t.Errorf("same: %v, want %v", !c.same, c.same)
			}
		})
	}
	if !Same(nil, nil) {
		t.Error("a file that stays missing has changed")
	}
}
