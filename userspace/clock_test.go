package userspace

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// byTheClock is how a time is made that has no reading of the monotonic clock.
var byTheClock = regexp.MustCompile(`\.Unix(?:Nano|Micro|Milli)\(\)|time\.Unix\(0, `)

// TestAges: an age that is kept as a number is one of package moment: who sets the machine's clock ends no
// connection.
func TestAges(t *testing.T) {
	files := 0
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") ||
			strings.Contains(path, "acmetest") { // serial numbers
			return err
		}
		files++
		text, err := os.ReadFile(path)
		for i, line := range strings.Split(string(text), "\n") {
			if byTheClock.MatchString(line) {
				t.Errorf("%s:%d: an age by the machine's clock: %s", path, i+1, strings.TrimSpace(line))
			}
		}
		return err
	})
	if err != nil || files < 100 {
		t.Errorf("%d files, %v", files, err)
	}
}
