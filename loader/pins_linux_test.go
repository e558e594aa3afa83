package loader

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/host"
	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/loader/pins"
	"github.com/tailsplice/tailsplice/loader/skmsg"
)

// Where others may write to the BPF file system, they can't have the daemon empty a folder by a link to it,
// nor keep its maps in a folder of theirs.
func TestPinsOfOthers(t *testing.T) {
	const nobody = 65534
	mkdir := func(t *testing.T, path string, uid int, mode uint32) {
		loadertest.Must(t, errors.Join(unix.Mkdir(path, mode), unix.Chmod(path, mode), unix.Chown(path, uid, uid)))
	}
	link := func(t *testing.T, to, path string, uid int) {
		loadertest.Must(t, errors.Join(os.Symlink(to, path), os.Lchown(path, uid, uid)))
	}
	const no = " can't be used for pinned maps: "
	for name, c := range map[string]struct {
		mode string
		make func(t *testing.T, at, victim string)
		want string // of the error, after where the file system is mounted; "": it is used
	}{
		"empty, sticky": {"1777", func(*testing.T, string, string) {}, ""},
		"a link to an instance": {"1777", func(t *testing.T, at, victim string) {
			mkdir(t, at+"/tailsplice", nobody, 0o755)
			link(t, victim, at+"/tailsplice/default", nobody)
		}, "/tailsplice" + no + "it belongs to the user 65534: look at it, and remove it (rm -r "},
		"a link in a folder of ours": {"0700", func(t *testing.T, at, victim string) {
			mkdir(t, at+"/tailsplice", 0, 0o700)
			link(t, victim, at+"/tailsplice/default", nobody)
		}, "/tailsplice/default" + no + "it is no folder, but maybe a link "},
		"a link to the folder of all": {"1777", func(t *testing.T, at, victim string) {
			link(t, filepath.Dir(victim), at+"/tailsplice", nobody)
		}, "/tailsplice" + no + "it is no folder, but maybe a link "},
		"anybody's, not sticky": {"1777", func(t *testing.T, at, _ string) {
			loadertest.Must(t, unix.Chmod(at, 0o777))
		}, no + "other users may write to it (mode 0777): chmod 0700 "},
		"another user's root": {"0755", func(t *testing.T, at, _ string) {
			loadertest.Must(t, unix.Chown(at, nobody, nobody))
		}, no + "it belongs to the user 65534: chown root "},
		"our folder, for all": {"1777", func(t *testing.T, at, _ string) {
			mkdir(t, at+"/tailsplice", 0, 0o1777)
		}, "/tailsplice" + no + "other users may write to it (mode 01777): chmod 0700 "},
		"another user's instance": {"0700", func(t *testing.T, at, _ string) {
			mkdir(t, at+"/tailsplice", 0, 0o700)
			mkdir(t, at+"/tailsplice/default", nobody, 0o755)
		}, "/tailsplice/default" + no + "it belongs to the user 65534"},
		"another file system": {"0700", func(t *testing.T, at, _ string) {
			mkdir(t, at+"/tailsplice", 0, 0o700)
			loadertest.Must(t, unix.Mount("none", at+"/tailsplice", "tmpfs", 0, ""))
			t.Cleanup(func() { unix.Unmount(at+"/tailsplice", unix.MNT_DETACH) })
		}, "/tailsplice is not in a BPF file system"},
	} {
		t.Run(name, func(t *testing.T) {
			at, victim := loadertest.OwnBPFFS(t, c.mode), filepath.Join(t.TempDir(), "default")
			loadertest.Must(t, os.MkdirAll(filepath.Join(victim, "empty"), 0o755))
			loadertest.Must(t, os.WriteFile(filepath.Join(victim, "file"), []byte("precious"), 0o600))
			c.make(t, at, victim)
			err := RemoveDead(at, slog.New(slog.DiscardHandler))
			l, lerr := load(Options{BPFFS: at, MaxFlows: 16}, nil)
			if lerr == nil {
				err = errors.Join(err, l.Close())
			}
			for _, kept := range []string{"file", "empty"} {
				if _, err := os.Lstat(filepath.Join(victim, kept)); err != nil {
					t.Errorf("somebody else's is gone: %v", err)
				}
			}
			f := pins.ProbeBPFFS(at, true)
			if c.want == "" {
				if err != nil || lerr != nil || f.State != host.StateOK {
					t.Errorf("%v, %v, %+v", err, lerr, f)
				}
				return
			}
			if lerr == nil || !strings.Contains(lerr.Error(), at+c.want) {
				t.Errorf("load: %v, want %q", lerr, at+c.want)
			}
			// It looks at no folder of an instance.
			if seen := !strings.HasPrefix(c.want, "/tailsplice/"); seen != (f.State == host.StateMissing) {
				t.Errorf("doctor says %+v", f)
			}
		})
	}
}

// Whoever comes next removes what killed daemons and self-tests left, whatever they were called, and nothing
// of one that lives.
func TestPinsOfTheDead(t *testing.T) {
	if name := os.Getenv("TS_LDR_INSTANCE"); name != "" {
		_, err := load(Options{BPFFS: os.Getenv("TS_LDR_BPFFS"), Instance: name, MaxFlows: 16}, nil)
		loadertest.Must(t, err)
		fmt.Println("ready")
		select {}
	}
	at := loadertest.OwnBPFFS(t, "0700")
	start := func(instance string) (kill func()) {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestPinsOfTheDead$")
		cmd.Env = append(os.Environ(), "TS_LDR_BPFFS="+at, "TS_LDR_INSTANCE="+instance)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		out, err := cmd.StdoutPipe()
		loadertest.Must(t, errors.Join(err, cmd.Start()))
		kill = func() { cmd.Process.Kill(); cmd.Wait() }
		t.Cleanup(kill)
		if b := make([]byte, 5); true {
			if _, err := io.ReadFull(out, b); err != nil || string(b) != "ready" {
				t.Fatalf("%q %v", b, err)
			}
		}
		return kill
	}
	next := map[string]func(t *testing.T){
		"a daemon of another name": func(t *testing.T) {
			l, err := load(Options{BPFFS: at, Instance: "new", MaxFlows: 16}, nil)
			loadertest.Must(t, err)
			loadertest.Must(t, l.Close())
		},
		"a self-test": func(t *testing.T) {
			for _, f := range SelfTest(Options{BPFFS: at}) {
				if f.State == host.StateMissing {
					t.Errorf("%+v", f)
				}
			}
		},
		"a daemon that loads nothing": func(t *testing.T) {
			var log bytes.Buffer
			loadertest.Must(t, RemoveDead(at, slog.New(slog.NewTextHandler(&log, nil))))
			if n := strings.Count(log.String(), "a daemon that was killed"); n != 2 {
				t.Errorf("two are dead, and the log says: %s", &log)
			}
		},
	}
	start("alive")
	alive := filepath.Join(at, "tailsplice", "alive")
	for name, come := range next {
		t.Run(name, func(t *testing.T) {
			for _, kill := range []func(){start("selftest-1"), start("run-tailsplice-old-sock")} {
				kill()
			}
			come(t)
			left, err := filepath.Glob(filepath.Join(at, "tailsplice", "*"))
			loadertest.Must(t, err)
			if len(left) != 1 || left[0] != alive {
				t.Errorf("%q are there, not only %q", left, alive)
			}
			if maps, err := os.ReadDir(filepath.Join(alive, "current")); err != nil || len(maps) < 5 {
				t.Errorf("the daemon that lives has %v, %v", maps, err)
			}
		})
	}
}

// generations are the names in the folder of an instance, with where the link leads.
func generations(t *testing.T, at, instance string) (names string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(at, "tailsplice", instance))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for _, e := range entries {
		names += e.Name()
		if to, err := os.Readlink(filepath.Join(at, "tailsplice", instance, e.Name())); err == nil {
			names += "=" + to
		}
		names += " "
	}
	return strings.TrimSpace(names)
}

// A new generation lives beside an old one, whichever ends first, and is seen only when it is whole. The link leads
// to the newest that lives.
func TestGenerations(t *testing.T) {
	at := loadertest.OwnBPFFS(t, "0700")
	o := Options{BPFFS: at, Instance: "one", MaxFlows: 16}
	is := func(when, want string) {
		t.Helper()
		if got := generations(t, at, "one"); got != want {
			t.Errorf("%s: there are %q, want %q", when, got, want)
		}
	}
	next := func() *Loader {
		t.Helper()
		l, err := load(o, nil)
		loadertest.Must(t, err)
		t.Cleanup(func() { l.Close() })
		return l
	}
	first := next()
	is("one lives", "1 current=1")
	second := next()
	is("two live", "1 2 current=2")
	third := next()
	loadertest.Must(t, second.Close())
	is("the second has ended", "1 3 current=3")
	loadertest.Must(t, third.Close())
	is("the newest has ended", "1 current=1")

	unborn, err := pins.Claim(at, "one", skmsg.HoldsUnread, slog.New(slog.DiscardHandler))
	loadertest.Must(t, err)
	is("one is being made", "1 current=1 new-1")
	loadertest.Must(t, RemoveDead(at, slog.New(slog.DiscardHandler)))
	is("somebody has looked for dead ones", "1 current=1 new-1")
	loadertest.Must(t, unborn.Publish())
	is("it is published", "1 2 current=2")
	p := loadertest.SplicePath(t, first, loadertest.PathOptions{})
	loadertest.Must(t, loadertest.BothWays(p, 1<<20))
	loadertest.Must(t, first.Close())
	is("the oldest has ended", "2 current=2")
	loadertest.Must(t, unborn.Release())
	is("all have ended", "")
	if _, err := os.Stat(filepath.Join(at, "tailsplice", "one")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the instance's folder is left: %v", err)
	}
}

// Whatever a process was doing when it was killed, the next one goes on.
func TestDeadGenerations(t *testing.T) {
	at := loadertest.OwnBPFFS(t, "0700")
	one := filepath.Join(at, "tailsplice", "one")
	for name, left := range map[string]func(){
		"not published": func() { loadertest.Must(t, os.MkdirAll(filepath.Join(one, "new-1"), 0o700)) },
		"not linked":    func() { loadertest.Must(t, os.MkdirAll(filepath.Join(one, "7"), 0o700)) },
		"link not renamed": func() {
			loadertest.Must(t, os.MkdirAll(filepath.Join(one, "7"), 0o700))
			loadertest.Must(t, os.Symlink("7", filepath.Join(one, "new-current")))
		},
		"linked": func() {
			loadertest.Must(t, os.MkdirAll(filepath.Join(one, "7"), 0o700))
			loadertest.Must(t, os.Symlink("7", filepath.Join(one, "current")))
		},
		"empty": func() { loadertest.Must(t, os.MkdirAll(one, 0o700)) },
	} {
		t.Run(name, func(t *testing.T) {
			left()
			l, err := load(Options{BPFFS: at, Instance: "one", MaxFlows: 16}, nil)
			loadertest.Must(t, err)
			if got := generations(t, at, "one"); got != "1 current=1" {
				t.Errorf("there are %q", got)
			}
			loadertest.Must(t, l.Close())
			left()
			loadertest.Must(t, RemoveDead(at, slog.New(slog.DiscardHandler)))
			if _, err := os.Stat(one); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%q is left", generations(t, at, "one"))
			}
		})
	}
}

// hasFlows reports whether there is any in the flows map.
func hasFlows(t *testing.T, l *Loader) bool {
	t.Helper()
	key, err := l.Shared()["flows"].NextKeyBytes(nil)
	loadertest.Must(t, err)
	return key != nil
}

// What a killed daemon leaves is found and removed; what a living one has is left alone.
func TestPins(t *testing.T) {
	loadertest.NeedRoot(t)
	instance := fmt.Sprintf("ts-ldr-pins-%d", os.Getpid())
	if i := os.Getenv("TS_LDR_PINS"); i != "" {
		l, err := load(Options{BPFFS: os.Getenv("TS_LDR_BPFFS"), Instance: i, MaxFlows: 16}, nil)
		loadertest.Must(t, err)
		loadertest.SplicePath(t, l, loadertest.PathOptions{})
		fmt.Println("ready")
		select {}
	}
	at := loadertest.OwnBPFFS(t, "0700") // whoever loads anything removes what was left, elsewhere too
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestPins$")
	cmd.Env = append(os.Environ(), "TS_LDR_PINS="+instance, "TS_LDR_BPFFS="+at)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	loadertest.Must(t, err)
	loadertest.Must(t, cmd.Start())
	if b := make([]byte, 5); true {
		if _, err := io.ReadFull(out, b); err != nil || string(b) != "ready" {
			t.Fatalf("%q %v", b, err)
		}
	}
	beside, err := load(Options{BPFFS: at, Instance: instance, MaxFlows: 16}, nil)
	loadertest.Must(t, err)
	if hasFlows(t, beside) {
		t.Error("the next generation begins with flows")
	}
	loadertest.Must(t, beside.Close())
	if left, err := os.ReadDir(filepath.Join(at, "tailsplice", instance, "current")); err != nil || len(left) == 0 {
		t.Fatalf("the next generation has left the living daemon %v, %v", left, err)
	}
	other, err := load(Options{BPFFS: at, Instance: instance + "x", MaxFlows: 16}, nil)
	loadertest.Must(t, err)
	loadertest.Must(t, cmd.Process.Kill())
	cmd.Wait()
	dir := filepath.Join(at, "tailsplice", instance)
	if left, err := os.ReadDir(dir); err != nil || len(left) == 0 {
		t.Fatalf("the killed daemon left %v, %v", left, err)
	}
	l, err := load(Options{BPFFS: at, Instance: instance, MaxFlows: 16}, nil)
	loadertest.Must(t, err)
	if hasFlows(t, l) {
		t.Error("flows of the dead daemon are there")
	}
	p := loadertest.SplicePath(t, l, loadertest.PathOptions{})
	loadertest.Must(t, loadertest.BothWays(p, 1<<20))
	loadertest.Must(t, l.Close())
	loadertest.Must(t, l.Close())
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left: %v", dir, err)
	}
	p = loadertest.SplicePath(t, other, loadertest.PathOptions{})
	loadertest.Must(t, loadertest.BothWays(p, 1<<20))
	loadertest.Must(t, other.Close())
}
