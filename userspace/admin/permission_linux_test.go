package admin

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// TestListenWithoutPermission: a daemon goes on without a control socket where
// it may not make one, so it must be able to tell that from other errors.
func TestListenWithoutPermission(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o555); err != nil {
		t.Fatal(err)
	}
	if os.Getuid() == 0 {
		// Nobody, for this thread's way with files only.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer unix.Setfsuid(0)
		unix.Setfsuid(65534)
	}
	for _, path := range []string{filepath.Join(dir, "control.sock"), filepath.Join(dir, "sub", "control.sock")} {
		if _, err := Listen(path); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("%s: %v: want a permission error", path, err)
		}
	}
}
