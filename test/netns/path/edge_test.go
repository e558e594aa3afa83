package path

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// TestEdgeKnowsNothing: no key on an edge's disk, and no plaintext on its wires or in its memory, while a
// secret travels both ways by it.
func TestEdgeKnowsNothing(t *testing.T) {
	s := world(t)
	secret := []byte("plaintext-" + strconv.FormatInt(time.Now().UnixNano(), 36) + "-plaintext")
	const posts, repeat = 20, 100
	var wire capture
	if err := wire.start(s.EdgeA); err != nil {
		t.Fatal(err)
	}
	c := s.browser(s.Client, "tcp4", true)
	defer c.CloseIdleConnections()
	for range posts {
		res, err := c.Post("https://"+lab.Site+"/echo", "application/octet-stream",
			bytes.NewReader(bytes.Repeat(secret, repeat)))
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(res.Body)
		res.Body.Close()
		if !bytes.Contains(body, secret) {
			t.Fatalf("echo: %d, %d bytes without the secret", res.StatusCode, len(body))
		}
	}
	inMemory := memoryHas(t, s.edgeA.Pid(), secret) // while the connection lives
	atHome := memoryHas(t, s.home.Pid(), secret)    // where TLS ends
	seen := wire.stop()
	if len(seen) < 2*posts*repeat*len(secret) {
		t.Fatalf("captured %d bytes on the edge: the capture does not see the traffic", len(seen))
	}
	if bytes.Contains(seen, secret) {
		t.Error("the secret crosses the edge's wires in the clear")
	}
	if inMemory {
		t.Error("the secret is in the edge's memory")
	}
	if !atHome {
		t.Error("the look into memory finds nothing at home either: it proves nothing")
	}
	for _, edge := range s.Edges() {
		if _, err := edge.ReadFile(lab.KeyFile); err == nil {
			t.Errorf("%s has %s", edge.Name, lab.KeyFile)
		}
		err := filepath.WalkDir(edge.Dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return nil
			}
			if b, _ := os.ReadFile(path); bytes.Contains(b, []byte("PRIVATE KEY")) {
				t.Errorf("%s has a private key: %s", edge.Name, path)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// capture keeps what crosses a host's interfaces, headers and all.
type capture struct {
	fd   int
	quit chan struct{}
	done chan []byte
}

func (c *capture) start(h *lab.Host) error {
	err := h.Do(func() (err error) {
		const all = unix.ETH_P_ALL>>8 | unix.ETH_P_ALL<<8&0xff00 // in network order
		c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all)
		return err
	})
	if err != nil {
		return fmt.Errorf("capture on %s: %w", h.Name, err)
	}
	unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20)
	unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 200_000})
	c.quit, c.done = make(chan struct{}), make(chan []byte, 1)
	quit := c.quit
	stop := time.Now().Add(10 * time.Minute) // routing protocols never are quiet
	go func() {
		var all []byte
		buf := make([]byte, 1<<17)
		for time.Now().Before(stop) {
			n, err := unix.Read(c.fd, buf)
			if err == unix.EBADF {
				break
			}
			if err == nil {
				all = append(all, buf[:n]...)
			}
			select {
			case <-quit:
				stop, quit = time.Now().Add(500*time.Millisecond), nil
			default:
			}
		}
		c.done <- all
	}()
	return nil
}

// stop waits a little for what is under way, and returns all that was seen.
func (c *capture) stop() []byte {
	defer unix.Close(c.fd)
	close(c.quit)
	return <-c.done
}

// memoryHas looks for b in the memory of a process.
func memoryHas(t *testing.T, pid int, b []byte) bool {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	read := 0
	const chunk = 1 << 20
	buf := make([]byte, chunk+len(b))
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		var perm string
		if n, _ := fmt.Sscanf(line, "%x-%x %s", &from, &to, &perm); n != 3 || !strings.HasPrefix(perm, "rw") {
			continue
		}
		for ; from < to; from += chunk { // each chunk overlaps the next by what is looked for
			n, _ := mem.ReadAt(buf[:min(int64(len(buf)), to-from)], from)
			read += n
			if bytes.Contains(buf[:n], b) {
				return true
			}
		}
	}
	if read < 1<<20 {
		t.Fatalf("only %d bytes of the memory of %d can be read", read, pid)
	}
	return false
}
