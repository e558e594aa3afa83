// Package tailnet_test runs userspace/tailnet and userspace/dial against real
// tailscaled nodes in the lab. It lives here for the sake of the lab's imports.
package tailnet_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/tailnet"
)

// dialEnv makes this program a dialer: the JSON of a [request] in it is done,
// and a [response] printed. A lab's host runs it so, for its goroutines must
// all be in the host's namespaces.
const dialEnv = "TAILNET_TEST_DIAL"

type request struct {
	Target  dial.Target
	Prefer  netip.Addr
	Timeout time.Duration
}

type response struct {
	Local, Peer string
	Reason      dial.Reason
	Err         string
	Took        time.Duration
}

func TestMain(m *testing.M) {
	if r := os.Getenv(dialEnv); r != "" {
		serve(r)
		return
	}
	os.Exit(m.Run())
}

func serve(in string) {
	var r request
	if err := json.Unmarshal([]byte(in), &r); err != nil {
		panic(err)
	}
	// The default socket: what a daemon on this host would use.
	d := dial.Dialer{Tailnet: tailnet.New("", slog.New(slog.DiscardHandler)), Timeout: r.Timeout}
	began := time.Now()
	c, err := d.Dial(context.Background(), r.Target, r.Prefer)
	out := response{Took: time.Since(began)}
	if err != nil {
		out.Err = err.Error()
		var e *dial.Error
		if errors.As(err, &e) {
			out.Reason = e.Reason
		}
	} else {
		out.Local, out.Peer = c.LocalAddr().String(), c.RemoteAddr().String()
		c.Close()
	}
	json.NewEncoder(os.Stdout).Encode(out)
}

// dialOn dials from a host.
func dialOn(t *testing.T, h *lab.Host, r request) response {
	t.Helper()
	in, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := h.Command(t.Context(), self)
	cmd.Env = append(cmd.Env, dialEnv+"="+string(in))
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var res response
	if err := json.Unmarshal(out, &res); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Logf("%s -> %s: %+v", h.Name, r.Target, res)
	return res
}

// follow returns a client of the host's tailscaled that watches, and the
// number of its change notices.
func follow(t *testing.T, h *lab.Host) (*tailnet.Client, *notices) {
	t.Helper()
	return followAt(t, h.Node.Socket)
}

// followAt is follow by the tailscaled behind a socket.
func followAt(t *testing.T, socket string) (*tailnet.Client, *notices) {
	t.Helper()
	c := tailnet.New(socket, slog.New(slog.NewTextHandler(t.Output(), nil)))
	n := &notices{heard: make(chan struct{}, 100)}
	c.OnChange(func() { n.heard <- struct{}{} })
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { c.Run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
	n.wait(t, "the first table")
	return c, n
}

// counting is a socket that leads to another one, and counts the questions who an
// address is.
func counting(t *testing.T, to string) (socket string, asked *atomic.Int64) {
	t.Helper()
	socket, asked = filepath.Join(t.TempDir(), "s"), new(atomic.Int64)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			d, err := net.Dial("unix", to)
			if err != nil {
				c.Close()
				continue
			}
			go func() {
				defer c.Close()
				io.Copy(c, d)
			}()
			go func() {
				defer d.Close()
				for b := make([]byte, 64<<10); ; {
					n, err := c.Read(b)
					asked.Add(int64(bytes.Count(b[:n], []byte("/localapi/v0/whois"))))
					if _, werr := d.Write(b[:n]); err != nil || werr != nil {
						return
					}
				}
			}()
		}
	}()
	return socket, asked
}

// notices are calls of OnChange.
type notices struct{ heard chan struct{} }

func (n *notices) wait(t *testing.T, what string) {
	t.Helper()
	select {
	case <-n.heard:
	case <-time.After(patience):
		t.Fatalf("no notice of %s", what)
	}
}

func (n *notices) forget() {
	for {
		select {
		case <-n.heard:
		default:
			return
		}
	}
}

// patience is for what comes sooner or later, on a machine that is busy too.
const patience = time.Minute

// eventually tries f until it succeeds, and returns how long that took: what is
// not heard of by a notice is never asked for again.
func eventually(t *testing.T, f func() error) time.Duration {
	t.Helper()
	began := time.Now()
	for {
		err := f()
		took := time.Since(began)
		switch {
		case err == nil:
			return took
		case took > patience:
			t.Fatalf("after %s: %v", took, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// refused wants an error of that kind, saying all of says.
func refused(err error, kind tailnet.Kind, says ...string) error {
	var e *tailnet.Error
	if !errors.As(err, &e) || e.Kind != kind {
		return fmt.Errorf("%v, want an error of kind %s", err, kind)
	}
	for _, s := range says {
		if !strings.Contains(err.Error(), s) {
			return fmt.Errorf("%q does not say %q", err, s)
		}
	}
	return nil
}

// echo serves on a host until the test ends.
func echo(t *testing.T, h *lab.Host, network, addr string) net.Listener {
	t.Helper()
	l, err := h.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	return l
}
