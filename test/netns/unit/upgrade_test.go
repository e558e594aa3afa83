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
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// upgrade has another process take over under systemd and the sandbox of the unit: systemd follows it, flows of
// some ports go over to it and live on, those of others may end in the old process, which ends with them.
func (m *machine) upgrade(t *testing.T, w *lab.World, moving, stay []int) {
	ports := slices.Concat(moving, stay)
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
	for _, e := range flows[len(moving):] {
		e.c.Close()
	}
	flows = flows[:len(moving)]
	for end := time.Now().Add(time.Minute); m.command(t.Context(), "test", "-d", "/proc/"+old).Run() == nil; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the old process is still there:\n%s\n%s", m.run(t, "tailsplice", "status"), m.journal())
		}
	}
	use()
	var shown []struct{ Listener, Upstream string }
	if err := json.Unmarshal([]byte(m.run(t, "tailsplice", "flows", "--json")), &shown); err != nil {
		t.Fatal(err)
	}
	if len(shown) < len(moving) {
		t.Errorf("of %d flows that have come `tailsplice flows` shows %+v", len(moving), shown)
	}
	for _, e := range flows {
		e.c.Close()
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
