package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/freeaddr"
)

// sleepy stands in for dockerd with one container, which is in the host's network.
type sleepy struct {
	asked   chan struct{} // gets a value when it is to be started
	release chan struct{} // it is once that has one
	stop    chan struct{} // gets a value when it is to be stopped, and it is once that has one; nil: at once

	mu      sync.Mutex
	runs    bool
	started time.Time
	stops   int // how often it was stopped
}

const sleepyID = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

var dockerVersion = regexp.MustCompile(`^/v[0-9.]+`)

// newSleepy has the daemons that are started from now on ask it.
func newSleepy(t *testing.T) *sleepy {
	t.Helper()
	s := &sleepy{asked: make(chan struct{}, 10), release: make(chan struct{}, 10)}
	dir, err := os.MkdirTemp("", "ts-dock-")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	ln, err := net.Listen("unix", filepath.Join(dir, "sock"))
	check(t, err)
	srv := &http.Server{Handler: s}
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
	t.Setenv("DOCKER_HOST", "unix://"+ln.Addr().String())
	return s
}

func (s *sleepy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path := dockerVersion.ReplaceAllString(r.URL.Path, "")
	if path == "/containers/"+sleepyID+"/start" {
		s.asked <- struct{}{}
		<-s.release
	}
	if path == "/containers/"+sleepyID+"/stop" && s.stop != nil {
		s.stop <- struct{}{}
		<-s.stop
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	state, text := "exited", "Exited (0) 2 hours ago"
	if s.runs {
		state, text = "running", "Up 2 seconds"
	}
	w.Header().Set("Api-Version", "1.47")
	var answer any
	switch path {
	case "/_ping":
	case "/info":
		answer = map[string]any{}
	case "/containers/json":
		answer = []any{map[string]any{"Id": sleepyID, "Names": []string{"/sleepy"}, "State": state, "Status": text,
			"HostConfig": map[string]any{"NetworkMode": "host"}}}
	case "/containers/" + sleepyID + "/json":
		answer = map[string]any{"Id": sleepyID, "Name": "/sleepy", "State": map[string]any{"Status": state, "Running": s.runs,
			"StartedAt": s.started.UTC().Format(time.RFC3339Nano)}}
	case "/containers/" + sleepyID + "/start":
		s.runs, s.started = true, time.Now()
		w.WriteHeader(http.StatusNoContent)
	case "/containers/" + sleepyID + "/stop":
		s.runs = false
		s.stops++
		w.WriteHeader(http.StatusNoContent)
	default: // there are no events
		http.Error(w, `{"message":"forbidden"}`, http.StatusForbidden)
	}
	if answer != nil {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(answer)
	}
}

// isStopped waits until it was stopped so often.
func (s *sleepy) isStopped(t *testing.T, times int) {
	t.Helper()
	wait(t, "the container is stopped", func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.stops != times || s.runs {
			return fmt.Errorf("it was stopped %d times, want %d, and runs: %v", s.stops, times, s.runs)
		}
		return nil
	})
}

// sleepyListener leads there. What answers is hello.
func sleepyListener(t *testing.T, address, idle string) string {
	hello := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "hello") }))
	t.Cleanup(hello.Close)
	_, port, err := net.SplitHostPort(hello.Listener.Addr().String())
	check(t, err)
	return fmt.Sprintf(`  - { listen: [%q], mode: http, default: { forward: "docker://sleepy:%s", wake: { docker: true, idle: %s }, hold: 1m } }`, address, port, idle)
}

// TestUpgradeWhileWaking: a container is stopped when nobody uses it, also where it was started for a request that
// the old process goes on with after an upgrade, or after two.
func TestUpgradeWhileWaking(t *testing.T) {
	s := newSleepy(t)
	address := freeaddr.Get(t)
	d := startVerbs(t, sleepyListener(t, address, "1s"))
	for times := 1; times <= 2; times++ {
		answered := make(chan error, 1)
		go func() { answered <- getHello("http://" + address) }()
		<-s.asked
		for range times {
			d.says(true, "has taken over", "upgrade")
		}
		s.release <- struct{}{}
		check(t, <-answered)
		s.isStopped(t, times)
	}
	if n := strings.Count(d.logged(), "a container was stopped: nobody has used it"); n != 2 {
		t.Errorf("the log says %d times that it was stopped", n)
	}
}

// TestUpgradeWhileStopping: a container that the old process is stopping is none that runs for the new one,
// which starts it again for who comes.
func TestUpgradeWhileStopping(t *testing.T) {
	s := newSleepy(t)
	s.stop = make(chan struct{})
	address := freeaddr.Get(t)
	d := startVerbs(t, sleepyListener(t, address, "1s"))
	s.release <- struct{}{}
	check(t, getHello("http://"+address))
	<-s.asked
	<-s.stop
	upgraded := make(chan struct{})
	go func() {
		defer close(upgraded)
		d.says(true, "has taken over", "upgrade")
	}()
	select {
	case <-upgraded:
		t.Error("the new process takes over while the container is being stopped")
	case <-time.After(2 * time.Second): // what must not come has a while to come
	}
	s.stop <- struct{}{}
	<-upgraded
	s.isStopped(t, 1)
	s.release <- struct{}{}
	check(t, getHello("http://"+address))
	select {
	case <-s.asked:
	default:
		t.Error("a request goes to a container that was stopped")
	}
	<-s.stop // when nobody uses it
	s.stop <- struct{}{}
	s.isStopped(t, 2)
}

// TestCrashWoken: the process after a crash stops what the one before it has started.
func TestCrashWoken(t *testing.T) {
	s := newSleepy(t)
	address := freeaddr.Get(t)
	m := newManager(t)
	file := filepath.Join(m.dir, "edge.yaml")
	check(t, os.WriteFile(file, fmt.Appendf(nil, "listeners:\n%s\ncontrol: { socket: %q }\n", sleepyListener(t, address, "6s"),
		filepath.Join(m.dir, "control.sock")), 0o600))
	m.args = []string{"run", "--config", file, "--log-format", "json"}
	m.start()
	s.release <- struct{}{}
	wait(t, "it is woken", func() error { return getHello("http://" + address) })
	wait(t, "it is kept who has started it", func() error {
		if text := m.state(); !strings.Contains(text, sleepyID) {
			return errors.New("kept is " + text)
		}
		return nil
	})
	m.kill()
	m.start()
	s.isStopped(t, 1)
}
