package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Where a daemon's files are on its host.
const (
	ConfigFile    = "/etc/tailsplice/tailsplice.yaml"
	ControlSocket = "/run/tailsplice/control.sock"
)

// Daemon is a `tailsplice run` on a host.
type Daemon struct {
	*Process
	bin string
}

// Tailsplice builds the daemon of this repository, installs the configuration, starts the daemon on the host
// and waits until it is ready. The test fails if it isn't within a minute.
func (h *Host) Tailsplice(tb testing.TB, config string) *Daemon {
	tb.Helper()
	bin, err := BuildTailsplice(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(tb.Context(), time.Minute)
	defer cancel()
	d, err := h.StartTailsplice(ctx, bin, config)
	if err != nil {
		tb.Fatal(err)
	}
	return d
}

// StartTailsplice runs `BIN run --config ConfigFile` on the host with the given configuration, and waits
// until the daemon answers on its control socket. The world stops it when it ends.
func (h *Host) StartTailsplice(ctx context.Context, bin, config string) (*Daemon, error) {
	if err := h.WriteFile(ConfigFile, []byte(config), 0o644); err != nil {
		return nil, err
	}
	p, err := h.StartProcess("tailsplice", daemonArgs(bin), nil)
	if err != nil {
		return nil, err
	}
	d := &Daemon{Process: p, bin: bin}
	return d, d.WaitReady(ctx)
}

func daemonArgs(bin string) []string { return []string{bin, "run", "--config", ConfigFile} }

// WaitReady waits until the daemon answers on its control socket, which is when it listens.
func (d *Daemon) WaitReady(ctx context.Context) error {
	socket := filepath.Join(d.Host.Dir, ControlSocket)
	return d.waitFor(ctx, "ready", func() error {
		c, err := net.Dial("unix", socket)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := io.WriteString(c, "GET /v1/status HTTP/1.0\r\n\r\n"); err != nil {
			return err
		}
		_, err = io.ReadFull(c, make([]byte, 1))
		return err
	})
}

// Start starts the daemon again after its end, and waits until it is ready.
func (d *Daemon) Start(ctx context.Context) error {
	if d.Running() {
		return fmt.Errorf("tailsplice on %s runs already", d.Host.Name)
	}
	if err := d.start(daemonArgs(d.bin), nil); err != nil {
		return err
	}
	return d.WaitReady(ctx)
}

// Restart stops the daemon with SIGTERM, with SIGKILL after 5 s, and starts it again.
func (d *Daemon) Restart(ctx context.Context) error {
	d.Stop(5 * time.Second)
	return d.Start(ctx)
}

// SetConfig writes the configuration file; the daemon does not know yet.
func (d *Daemon) SetConfig(config string) error {
	return d.Host.WriteFile(ConfigFile, []byte(config), 0o644)
}

// Hangup sends SIGHUP: reload.
func (d *Daemon) Hangup() error { return d.Signal(syscall.SIGHUP) }

// CLI runs the daemon's binary on its host, e.g. CLI(ctx, "status", "--json"), and returns what it printed.
// An error has what it wrote to stderr.
func (d *Daemon) CLI(ctx context.Context, arg ...string) ([]byte, error) {
	return d.Host.Command(ctx, d.bin, arg...).Output()
}

// LogLine is a line of the daemon's JSON log.
type LogLine map[string]any

// LogLines is the daemon's log so far, without lines that are not JSON.
func (d *Daemon) LogLines() []LogLine {
	var lines []LogLine
	for line := range strings.Lines(d.Output()) {
		var l LogLine
		if json.Unmarshal([]byte(line), &l) == nil {
			lines = append(lines, l)
		}
	}
	return lines
}

// WaitLog waits until a line of the daemon's log satisfies ok, and returns the first such line.
func (d *Daemon) WaitLog(ctx context.Context, ok func(LogLine) bool) (LogLine, error) {
	for {
		for _, l := range d.LogLines() {
			if ok(l) {
				return l, nil
			}
		}
		if err := sleep(ctx, pollInterval); err != nil {
			return nil, fmt.Errorf("tailsplice on %s did not log what was awaited: %w\n%s", d.Host.Name, err,
				d.tail(20))
		}
	}
}

// Files counts the daemon's open file descriptors.
func (d *Daemon) Files() int {
	fds, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.Pid()))
	return len(fds)
}
