package announce

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/logs"
)

// patience is for what comes sooner or later, on a machine that is busy too.
const patience = time.Minute

// told is an announcer whose programs write what they are told into a file.
type told struct {
	*Announcer
	t         *testing.T
	spec      Spec
	dir, said string
	log       *logs.Log
}

func begin(t *testing.T) *told {
	dir := t.TempDir()
	a := &told{t: t, dir: dir, said: filepath.Join(dir, "said"), log: &logs.Log{}}
	a.Announcer = New(a.log.Logger())
	t.Cleanup(a.Leave)
	a.spec = Spec{Listener: "web", File: filepath.Join(dir, "web.up"), Timeout: patience,
		Up: a.program(`echo "up $TAILSPLICE_LISTENER $TAILSPLICE_STATE"`), Down: a.program(`echo "down $TAILSPLICE_STATE $TAILSPLICE_REASON"`)}
	return a
}

// program is one that appends what script prints to the file said.
func (a *told) program(script string) []string {
	return []string{"sh", "-c", "{ " + script + "; } >>" + a.said}
}

// set sets a state, and waits until others know.
func (a *told) set(isUp bool, reason string) {
	a.t.Helper()
	a.Set(a.spec, isUp, reason)
	ctx, cancel := context.WithTimeout(a.t.Context(), patience)
	defer cancel()
	a.Wait(ctx)
	if ctx.Err() != nil {
		a.t.Fatal("nothing was told")
	}
}

func (a *told) want(isThere bool, lines ...string) {
	a.t.Helper()
	b, err := os.ReadFile(a.spec.File)
	if isThere && string(b) != "up\n" || !isThere && !errors.Is(err, fs.ErrNotExist) {
		a.t.Errorf("the file: %q, %v", b, err)
	}
	if info, err := os.Stat(a.spec.File); err == nil && info.Mode().Perm() != 0o644 {
		a.t.Errorf("who runs as another user can't read it: %v", info.Mode())
	}
	said, _ := os.ReadFile(a.said)
	if want := strings.Join(lines, "\n"); strings.TrimSpace(string(said)) != want {
		a.t.Errorf("others were told\n%s\nwant\n%s", said, want)
	}
	if left, _ := filepath.Glob(filepath.Join(a.dir, ".*")); len(left) > 0 {
		a.t.Errorf("it leaves %v", left)
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v", what, patience)
		}
	}
}

// TestTold: others are told each change once, and at the end that there are to be no connections.
func TestTold(t *testing.T) {
	a := begin(t)
	if err := os.WriteFile(a.spec.File, []byte("of a daemon that was killed\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	a.set(false, "nobody answers")
	a.want(false, "down down nobody answers")
	a.set(true, "")
	a.set(true, "")
	a.want(true, "down down nobody answers", "up web up")
	a.End("the daemon ends")
	a.want(false, "down down nobody answers", "up web up", "down down the daemon ends")
	a.End("the daemon ends") // again
}

// TestAfter: nothing is told before what comes first, and then what was set last. Who ends or is held meanwhile
// does not wait.
func TestAfter(t *testing.T) {
	first := make(chan struct{})
	a, left := begin(t), begin(t)
	for _, a := range []*told{a, left} {
		a.After(first)
		a.Set(a.spec, false, "not yet")
		a.Set(a.spec, true, "")
	}
	left.Hold(true)
	left.Hold(false)
	left.Leave()
	<-left.gone
	left.want(false)
	time.Sleep(20 * time.Millisecond) // it waits now, as a rule
	a.want(false)
	close(first)
	a.set(true, "")
	a.want(true, "up web up")
	a.set(false, "nobody answers")
	a.want(false, "up web up", "down down nobody answers")
}

// TestLatest: of what is set while a program runs the last counts, and one runs at a time.
func TestLatest(t *testing.T) {
	a := begin(t)
	gate := filepath.Join(a.dir, "gate")
	a.spec.Up = a.program("echo begins; while [ ! -e " + gate + " ]; do sleep 0.01; done; echo ends")
	a.Set(a.spec, true, "")
	eventually(t, "the program runs", func() bool { b, _ := os.ReadFile(a.said); return len(b) > 0 })
	for i := range 20 {
		a.Set(a.spec, i%2 == 0, fmt.Sprint(i))
	}
	if err := os.WriteFile(gate, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	a.set(false, "19")
	a.want(false, "begins", "ends", "down down 19")
}

// TestRetry: what fails is logged once, is tried again, and keeps nobody waiting.
func TestRetry(t *testing.T) {
	a := begin(t)
	works := filepath.Join(a.dir, "works")
	a.spec.Up = a.program("[ -e " + works + " ] || { echo no >&2; exit 3; }; echo up")
	a.set(true, "")
	_, _, err := a.State()
	if err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), `"no"`) {
		t.Errorf("%v", err)
	}
	a.want(true)
	eventually(t, "it is tried again", func() bool { a.mu.Lock(); defer a.mu.Unlock(); return a.tries > 2 })
	if n := a.log.Count("can't be told"); n != 1 {
		t.Errorf("%d lines for one failure", n)
	}
	if err := os.WriteFile(works, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it succeeds", func() bool { _, _, err := a.State(); return err == nil })
	a.want(true, "up")
}

// TestHangs: a program that hangs is killed, and the next state is told.
func TestHangs(t *testing.T) {
	a := begin(t)
	a.spec.Timeout = 200 * time.Millisecond
	a.spec.Up = []string{"sleep", "600"}
	a.set(true, "")
	if _, _, err := a.State(); err == nil || !strings.Contains(err.Error(), "raise announce.timeout") {
		t.Errorf("%v", err)
	}
	a.spec.Timeout = patience
	a.set(false, "drained")
	a.want(false, "down down drained")
}

// TestHold: while another process may tell, nothing is told, and a program that runs is killed. What is set is
// told afterwards, or never.
func TestHold(t *testing.T) {
	a := begin(t)
	up := a.spec.Up
	a.spec.Up = a.program("echo $$; sleep 600")
	a.Set(a.spec, true, "")
	eventually(t, "the program runs", func() bool { b, _ := os.ReadFile(a.said); return len(b) > 0 })
	a.Hold(true)
	b, _ := os.ReadFile(a.said)
	pid := strings.TrimSpace(string(b))
	eventually(t, "it is killed", func() bool {
		stat, err := os.ReadFile("/proc/" + pid + "/stat")
		return err != nil || strings.Contains(string(stat), ") Z ")
	})
	os.Remove(a.said)
	a.spec.Up = up
	a.Set(a.spec, true, "")
	a.Hold(false)
	eventually(t, "it is told", func() bool { b, _ := os.ReadFile(a.said); return len(b) > 0 })
	a.want(true, "up web up")
	a.Leave()
	a.Set(a.spec, false, "late")
	<-a.gone
	a.want(true, "up web up")
}

// TestFile: where the file can't be made that is an error, which names it; another name takes the old one away.
func TestFile(t *testing.T) {
	a := begin(t)
	a.spec.Up, a.spec.Down = nil, nil
	a.set(true, "")
	old := a.spec.File
	a.spec.File = filepath.Join(a.dir, "other.up")
	a.set(true, "")
	if _, err := os.Stat(old); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the old file is there: %v", err)
	}
	a.want(true)
	a.spec.File = filepath.Join(a.dir, "none/web.up")
	a.set(true, "")
	if _, _, err := a.State(); err == nil || err.Error() != "announce.file "+a.spec.File+" can't be created: no such file or directory" {
		t.Errorf("%v", err)
	}
}
