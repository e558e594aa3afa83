package container

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/moby/api/types/container"
)

// recorded is what Docker 20.10 of Debian 12 answered to a list of all
// containers, read as the client library reads it.
func recorded(t *testing.T) *table {
	t.Helper()
	data, err := os.ReadFile("testdata/containers-20.10.json")
	if err != nil {
		t.Fatal(err)
	}
	var list []container.Summary
	if err := json.Unmarshal(data, &list); err != nil {
		t.Fatal(err)
	}
	return newTable(list, time.Now())
}

func TestTable(t *testing.T) {
	table := recorded(t)
	shortID := table.byName["blog"].id[:idPrefix]
	blog := strings.Join(list(table.byName["blog"]), " ")
	db := strings.Join(list(table.byName["wiki-db-1"]), " ")
	for _, c := range []struct {
		name string
		turn int
		want string // addresses
		kind Kind
		says string
	}{
		{name: "blog", want: blog},
		{name: "/blog", want: blog},
		{name: shortID, want: blog},
		{name: shortID[:idPrefix-1], kind: KindUnknown},
		{name: "journal", kind: KindUnknown}, // what a link calls blog is not its name
		{name: "linked/journal", kind: KindUnknown},
		{name: "both", want: "172.17.0.3 10.77.0.2 fd77::2"}, // bridge before dual, IPv4 first
		{name: "guest", want: blog},
		{name: "onhost", want: "127.0.0.1 ::1"},
		{name: "alone", kind: KindUnreachable, says: "no network"},
		{name: "old", kind: KindStopped},
		{name: "never", kind: KindStopped},
		{name: "api", turn: 0, want: "172.17.0.4 172.17.0.5"},
		{name: "api", turn: 1, want: "172.17.0.5 172.17.0.4"},
		{name: "shop/api", want: "172.17.0.4 172.17.0.5"},
		{name: "shop_api", want: "172.17.0.4 172.17.0.5"},
		{name: "shop-api", want: "172.17.0.4 172.17.0.5"},
		{name: "shop-api-2", want: "172.17.0.5"},
		{name: "db", kind: KindAmbiguous, says: "shop/db or wiki/db"},
		{name: "wiki/db", want: db},
		{name: "job", kind: KindUnknown}, // `compose run` is no replica
		{name: "blok", kind: KindUnknown, says: `did you mean "blog"?`},
		{name: "shop/apy", kind: KindUnknown, says: `did you mean "shop/api"?`},
		{name: "Blog", kind: KindUnknown, says: `did you mean "blog"?`}, // Docker's names have case
		{name: "web", kind: KindUnknown},
		{name: "", kind: KindUnknown},
		{name: "/", kind: KindUnknown},
	} {
		addrs, err := table.resolve(c.name, c.turn)
		var got []string
		for _, a := range addrs {
			got = append(got, a.String())
		}
		var e *Error
		switch {
		case c.kind == "" && err != nil:
			t.Errorf("%q: %v", c.name, err)
		case c.kind == "" && strings.Join(got, " ") != c.want:
			t.Errorf("%q turn %d is at %s, want %s", c.name, c.turn, got, c.want)
		case c.kind != "" && (!errors.As(err, &e) || e.Kind != c.kind || !strings.Contains(err.Error(), c.says)):
			t.Errorf("%q: %v, %v; want kind %s saying %q", c.name, got, err, c.kind, c.says)
		}
	}
}

func list(o *one) (s []string) {
	for _, a := range o.addrs {
		s = append(s, a.String())
	}
	return s
}

// TestAbsent: each way of there being no daemon is told apart, and says what to do.
func TestAbsent(t *testing.T) {
	dir := t.TempDir()
	dead := filepath.Join(dir, "dead")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	for _, c := range []struct {
		name, host string
		says       []string
		cause      error
	}{
		{"no socket", "unix://" + dir + "/none", []string{dir + "/none", "systemctl enable --now docker", "DOCKER_HOST"}, syscall.ENOENT},
		{"dead socket", "unix://" + dead, []string{dead, "systemctl start docker"}, syscall.ECONNREFUSED},
		{"no host", "nonsense", []string{"nonsense"}, nil},
		{"no TCP", "tcp://127.0.0.1:1", []string{"tcp://127.0.0.1:1"}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				_, err := New(c.host, slog.New(slog.DiscardHandler)).Resolve(t.Context(), "blog")
				var e *Error
				if !errors.As(err, &e) || e.Kind != KindAbsent || e.Reason() != "no_dockerd" {
					t.Fatalf("%v", err)
				}
				for _, s := range c.says {
					if !strings.Contains(err.Error(), s) {
						t.Errorf("%q does not say %q", err, s)
					}
				}
				if c.cause != nil && !errors.Is(err, c.cause) {
					t.Errorf("%v does not wrap %v", err, c.cause)
				}
				if took := time.Since(began); took > 0 { // by a clock that moves only while everybody waits
					t.Errorf("it waited for %s", took)
				}
			})
		})
	}
}

// TestHost: what is given, else the environment, else the default.
func TestHost(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	t.Setenv("DOCKER_HOST", "unix:///from/env")
	if h := New("", log).Host(); h != "unix:///from/env" {
		t.Error(h)
	}
	if h := New("unix:///given", log).Host(); h != "unix:///given" {
		t.Error(h)
	}
	t.Setenv("DOCKER_HOST", "")
	if h := New("", log).Host(); h != "unix:///var/run/docker.sock" {
		t.Error(h)
	}
}

// TestHealth reads what daemons before and since version 1.52 of the API say.
func TestHealth(t *testing.T) {
	for want, list := range map[string][]container.Summary{
		"starting":  {{Status: "Up 2 seconds (health: starting)"}, {Status: "Up 1 second", Health: &container.HealthSummary{Status: container.Starting}}},
		"unhealthy": {{Status: "Up 3 minutes (unhealthy)"}, {Status: "Up 3 minutes (healthy)", Health: &container.HealthSummary{Status: container.Unhealthy}}},
		"": {{}, {Status: "Up 3 minutes"}, {Status: "Up 3 minutes (healthy)"}, {Status: "Up 3 minutes (Paused)"}, {Status: "Exited (1) 3 minutes ago"},
			{Status: "Up 1 hour", Health: &container.HealthSummary{Status: container.NoHealthcheck}}},
	} {
		for _, s := range list {
			if got := health(&s); got != want {
				t.Errorf("%q, %+v: %q, want %q", s.Status, s.Health, got, want)
			}
		}
	}
}
