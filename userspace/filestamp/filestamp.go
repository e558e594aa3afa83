// Package filestamp tells whether a file has changed, by what can be seen of it from outside.
package filestamp

import (
	"io/fs"
	"os"
	"time"
)

// Every is how often a file is looked at for a change.
const Every = time.Second

// Same reports whether nobody has written or replaced a file, or changed its permissions, between two looks.
// nil is a file that was missing.
func Same(a, b fs.FileInfo) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size() && a.Mode() == b.Mode()
}
