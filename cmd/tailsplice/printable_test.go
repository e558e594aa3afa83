package main

import (
	"context"
	"encoding/json"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/logs"
	"github.com/tailsplice/tailsplice/userspace/acme"
	"github.com/tailsplice/tailsplice/userspace/admin"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/server"
)

// evil sets a terminal's title, clears its screen in two ways, begins a line of its own, and turns text round.
const evil = "x\x1b]0;owned\x07\x1b[2J\u009b2J\x7f\r\nrefused: none\u202eb"

// raw says whether text has what a terminal obeys.
func raw(text string) bool { return strings.ContainsAny(text, "\x1b\x07\u009b\x7f\r") }

// TestPrintable asks a daemon that passes on what strangers wrote.
func TestPrintable(t *testing.T) {
	dir, err := os.MkdirTemp("", "ts-print-") // short, for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "c.sock")
	ln, err := admin.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	d := admin.Daemon{
		Status: func() any {
			return server.Status{Node: "home", Problems: []server.Problem{{Part: server.PartAddress, Name: evil, Problem: evil}}, Refused: map[string]int64{evil: 1}, Listeners: []server.ListenerStatus{{Name: "web", ACME: []acme.Status{{Name: "a.test", State: acme.StateFailing, Problem: evil}}}}}
		},
		Flows: func(url.Values) (any, error) { return []flow.Snapshot{{ID: "1", Name: evil, Target: evil}}, nil },
		Top: func(_ context.Context, _ url.Values, send func(any) error) error {
			return send(flow.Sample{Flows: []flow.Rate{{Snapshot: flow.Snapshot{ID: "1", Name: evil, Target: evil}}}})
		},
	}
	go admin.Serve(ctx, ln, d.Handler(), new(logs.Log).Logger())
	for _, args := range []string{"status", "status --json", "flows", "flows --json", "top --rounds 1 --interval 100ms", "top --rounds 1 --interval 100ms --json"} {
		root := newRoot()
		var out strings.Builder
		root.SetOut(&out)
		root.SetArgs(append(strings.Fields(args), "--control", socket))
		if err := root.ExecuteContext(ctx); err != nil {
			t.Fatalf("%s: %v", args, err)
		}
		if text := out.String(); raw(text) || strings.Contains(text, "\nrefused: none") || !strings.Contains(text, "owned") {
			t.Errorf("%s: %q", args, text)
		}
		if strings.Contains(args, "--json") {
			var v any
			if err := json.Unmarshal([]byte(out.String()), &v); err != nil || !strings.Contains(string(mustJSON(v)), string(mustJSON(evil))[1:]) {
				t.Errorf("%s: %v: another text than the daemon's: %s", args, err, out.String())
			}
		}
	}
}

func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

// TestLogPrintable logs what strangers wrote.
func TestLogPrintable(t *testing.T) {
	for _, format := range []string{"json", "text"} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		stderr := os.Stderr
		os.Stderr = w
		log, _, lines, err := newLogger(runOptions{logFormat: format, logLevel: "info"}, os.Stderr)
		os.Stderr = stderr
		if err != nil {
			t.Fatal(err)
		}
		log.Info(evil, "name", evil, "short", "a\x7fb", "c1", "ä\u0085\u00a0")
		lines.Close(time.Minute)
		w.Close()
		b, err := io.ReadAll(r)
		r.Close()
		if err != nil {
			t.Fatal(err)
		}
		text := string(b)
		if raw(text) || strings.Contains(text, "\u0085") || strings.Count(text, "\n") != 1 || !strings.Contains(text, "ä") {
			t.Errorf("%s: %q", format, text)
		}
		var line struct{ Msg, Name, Short, C1 string }
		if format == "json" && (json.Unmarshal(b, &line) != nil || line.Msg != evil || line.Name != evil || line.Short != "a\x7fb" || line.C1 != "ä\u0085\u00a0") {
			t.Errorf("the line says something else: %q", line)
		}
	}
}
