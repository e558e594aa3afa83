package dial

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSocketOfOthers: a socket that the daemon may not write to is an error
// that says what to do.
func TestSocketOfOthers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "web.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if err := os.Chmod(path, 0); err != nil {
		t.Fatal(err)
	}
	if os.Getuid() == 0 {
		// Nobody, for this thread's way with files only.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer unix.Setfsuid(0)
		unix.Setfsuid(65534)
	}
	_, err = (&Dialer{}).Dial(t.Context(), Target{Scheme: Unix, Path: path}, netip.Addr{})
	var e *Error
	if !errors.As(err, &e) || e.Reason != Denied || !strings.Contains(err.Error(), "SupplementaryGroups=") {
		t.Errorf("got %v: want reason %s, and what to do", err, Denied)
	}
}
