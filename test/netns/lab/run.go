package lab

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// registryDir keeps one lock file for each run, whose content is the run's directory. The owner holds a flock
// on it as long as it lives, which, unlike a pid, can't be mistaken for another process.
const registryDir = "/run/tailsplice-lab"

// cgroupParent is where dockerd of a run puts its containers: cgroupParent/ID in every hierarchy.
const cgroupParent = "/tailsplice-lab"

// reapScript removes what a run named ID with its files in DIR left. It is idempotent. Names of namespaces
// are removed in a private mount namespace: there one sees also those that a later mount over /run/netns
// hides (the first `ip netns add` on a machine makes one), and removing the file unmounts it everywhere.
// Processes that PDEATHSIG is only just ending may still write: hence the tries.
const reapScript = `
trap "" INT TERM HUP QUIT
read -r _
PATH=$PATH:/usr/sbin:/sbin
unshare -m --propagation private /bin/sh -c '
	while mountpoint -q /run/netns; do umount -l /run/netns; done
	for ns in /run/netns/"$ID"-*; do
		[ -e "$ns" ] || continue
		umount -l "$ns" 2>/dev/null; rm -f "$ns"
	done
'
for try in 1 2 3 4 5 6 7 8 9 10; do
	left=
	rm -rf --one-file-system "$DIR" 2>/dev/null || left=1
	for cg in /sys/fs/cgroup"$CGROUP/$ID" /sys/fs/cgroup/*"$CGROUP/$ID"; do
		[ -d "$cg" ] || continue
		find "$cg" -depth -type d -exec rmdir {} + 2>/dev/null || left=1
		rmdir "${cg%/*}" 2>/dev/null
	done
	[ "$left" ] || break
	sleep 0.1
done
rm -f "$LOCK"
`

// run is the identity of one world on this machine and what ends with it.
type run struct {
	id   string // "tsl-3fa9c2": prefix of every name in the root namespaces
	dir  string // every file of the run
	lock *os.File

	reaper     *exec.Cmd
	reaperPipe io.Closer // its end of file tells the reaper that this process has died, or is done
}

// newRun sweeps what dead runs left, and starts a run of its own.
func newRun() (_ *run, err error) {
	if err := os.MkdirAll(registryDir, 0o755); err != nil {
		return nil, err
	}
	if err := sweep(); err != nil {
		return nil, err
	}
	if err := shareNetnsDir(); err != nil {
		return nil, err
	}
	var b [3]byte
	rand.Read(b[:])
	r := &run{id: "tsl-" + hex.EncodeToString(b[:])}
	defer func() {
		if err != nil {
			r.end()
		}
	}()
	r.lock, err = os.OpenFile(filepath.Join(registryDir, r.id+".lock"), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(r.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("lock %s: %w", r.lock.Name(), err)
	}
	r.dir = filepath.Join(os.TempDir(), r.id)
	if _, err := r.lock.WriteString(r.dir); err != nil {
		return nil, err
	}
	if err := os.Mkdir(r.dir, 0o755); err != nil {
		return nil, err
	}
	pr, pw, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	r.reaperPipe = pw
	r.reaper = reap(r.id, r.dir, r.lock.Name())
	r.reaper.Stdin = pr
	r.reaper.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // it must outlive a signal to our process group
	err = r.reaper.Start()
	pr.Close()
	if err != nil {
		r.reaper = nil
		return nil, fmt.Errorf("start the reaper: %w", err)
	}
	return r, nil
}

// shareNetnsDir makes /run/netns a mount of its own, as the first `ip netns add` on a machine does: were that
// to come later, it would hide the names that we make now.
func shareNetnsDir() error {
	const dir = "/run/netns"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil { // as ip does
		return fmt.Errorf("lock %s: %w", dir, err)
	}
	err = unix.Mount("", dir, "", unix.MS_SHARED|unix.MS_REC, "")
	if errors.Is(err, unix.EINVAL) { // no mount yet
		if err = unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, ""); err == nil {
			err = unix.Mount("", dir, "", unix.MS_SHARED|unix.MS_REC, "")
		}
	}
	if err != nil {
		return fmt.Errorf("make %s a shared mount: %w", dir, err)
	}
	return nil
}

func reap(id, dir, lock string) *exec.Cmd {
	c := exec.Command("/bin/sh", "-c", reapScript)
	c.Env = append(os.Environ(), "ID="+id, "DIR="+dir, "LOCK="+lock, "CGROUP="+cgroupParent)
	c.Dir = "/"
	return c
}

// end lets the reaper remove everything, and waits for it.
func (r *run) end() error {
	var err error
	switch {
	case r.reaper != nil:
		r.reaperPipe.Close()
		err = r.reaper.Wait()
	case r.lock != nil:
		os.Remove(r.lock.Name())
	}
	if r.lock != nil {
		r.lock.Close()
	}
	return err
}

// sweep removes what runs left whose owner is dead.
func sweep() error {
	locks, err := filepath.Glob(filepath.Join(registryDir, "tsl-*.lock"))
	if err != nil {
		return err
	}
	for _, name := range locks {
		f, err := os.Open(name)
		if errors.Is(err, os.ErrNotExist) {
			continue // its own reaper was faster
		}
		if err != nil {
			return err
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			id := filepath.Base(name[:len(name)-len(".lock")])
			dir, err := io.ReadAll(f)
			if err == nil && filepath.Base(string(dir)) == id { // never remove a path that isn't a run's
				err = reap(id, string(dir), name).Run()
			} else if st, serr := f.Stat(); serr == nil && time.Since(st.ModTime()) > time.Minute {
				err = os.Remove(name) // killed between creating and writing it
			}
			if err != nil {
				f.Close()
				return fmt.Errorf("sweep the dead run %s: %w", id, err)
			}
		}
		f.Close()
	}
	return nil
}

// live holds the worlds that a signal has to end.
var live struct {
	sync.Mutex
	watch  sync.Once
	worlds map[*World]bool
}

func (w *World) register() {
	live.Lock()
	defer live.Unlock()
	if live.worlds == nil {
		live.worlds = map[*World]bool{}
	}
	live.worlds[w] = true
	live.watch.Do(func() { go closeOnSignal() })
}

func (w *World) unregister() {
	live.Lock()
	defer live.Unlock()
	delete(live.worlds, w)
}

// closeOnSignal ends all worlds, and this process, at the first SIGINT, SIGTERM or SIGHUP.
func closeOnSignal() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	sig := <-c
	fmt.Fprintf(os.Stderr, "\nlab: %v: taking the world down\n", sig)
	live.Lock()
	worlds := make([]*World, 0, len(live.worlds))
	for w := range live.worlds {
		worlds = append(worlds, w)
	}
	live.Unlock()
	for _, w := range worlds {
		w.Close()
	}
	os.Exit(128 + int(sig.(syscall.Signal)))
}
