package unit

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// upgrade has another process take over under systemd and the sandbox of the unit: systemd follows it, flows by
// each datapath go on in the old process, and that ends with them.
func (m *machine) upgrade(t *testing.T, w *lab.World, ports ...int) {
	property := func(name string) string {
		return m.run(t, "systemctl", "show", "--value", "--property="+name, service)
	}
	dial := func(port int) *echoed {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		c, err := w.Client.Dial(ctx, "tcp4", net.JoinHostPort(m.host.IP4.String(), fmt.Sprint(port)))
		if err != nil {
			t.Fatalf("%v\n%s", err, m.journal())
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(5 * time.Minute))
		e := &echoed{c, bufio.NewReader(c)}
		if _, err := e.r.ReadString('\n'); err != nil { // whom the target sees
			t.Fatal(err)
		}
		return e
	}
	var flows []*echoed
	for _, port := range ports {
		flows = append(flows, dial(port))
	}
	use := func() {
		t.Helper()
		for i, e := range flows {
			if err := e.exchange(1 << 20); err != nil {
				t.Errorf("flow to %d: %v\n%s", ports[i], err, m.journal())
			}
		}
	}
	use()
	old, restarts := property("MainPID"), property("NRestarts")
	t.Log(m.run(t, "tailsplice", "upgrade"))
	for end := time.Now().Add(time.Minute); property("MainPID") == old; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("systemd still takes process %s for the daemon\n%s", old, m.journal())
		}
	}
	use()
	if err := dial(ports[0]).exchange(1 << 10); err != nil {
		t.Errorf("a new flow: %v", err)
	}
	var status struct {
		Older []struct{ PID, Connections int }
	}
	if err := json.Unmarshal([]byte(m.run(t, "tailsplice", "status", "--json")), &status); err != nil {
		t.Fatal(err)
	}
	if o := status.Older; len(o) != 1 || fmt.Sprint(o[0].PID) != old || o[0].Connections != len(ports) {
		t.Errorf("status has %+v of process %s", o, old)
	}
	for _, e := range flows {
		e.c.Close()
	}
	for end := time.Now().Add(time.Minute); m.command(t.Context(), "test", "-d", "/proc/"+old).Run() == nil; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the old process is still there, with no flow left:\n%s", m.run(t, "tailsplice", "status"))
		}
	}
	if state := property("ActiveState") + " " + property("SubState"); state != "active running" || property("NRestarts") != restarts {
		t.Errorf("the unit is %s, and was restarted %s times, before %s", state, property("NRestarts"), restarts)
	}
	m.run(t, "systemctl", "reload", service)
	if now := property("MainPID"); strings.TrimSpace(now) == old || now == "0" {
		t.Errorf("after a reload the daemon is process %s", now)
	}
}

// echoed is a connection whose target sends back what it gets.
type echoed struct {
	c net.Conn
	r *bufio.Reader
}

func (e *echoed) exchange(size int) error {
	sent, got := make([]byte, size), make([]byte, size)
	rand.Read(sent)
	written := make(chan error, 1)
	go func() {
		_, err := e.c.Write(sent)
		written <- err
	}()
	if n, err := io.ReadFull(e.r, got); err != nil {
		return fmt.Errorf("%d of %d bytes came back: %w", n, size, err)
	}
	if err := <-written; err != nil {
		return err
	}
	if !bytes.Equal(sent, got) {
		return fmt.Errorf("other bytes came back")
	}
	return nil
}
