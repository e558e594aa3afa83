package pins

import (
	"cmp"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/loader/host"
)

const defaultBPFFS = "/sys/fs/bpf"

// Generation is one generation of an instance: the maps that one process has pinned, in
// BPFFS/tailsplice/INSTANCE/GENERATION.
//
// Each folder of a generation has a lock that dies with its process. A generation whose process lives is left
// alone, by one of the same instance too: that is a new binary, which lives beside the old one for a while.
// One whose process is dead is removed by whoever comes next, but for maps with bytes that another process
// has not read yet.
//
// The maps are pinned in a folder of another name (see newPrefix), which becomes the generation by a rename
// when all are there: who looks from outside sees all of them, or none. The link INSTANCE/current leads to
// the newest generation that lives. Names within an instance's folder change only under its lock, which is
// held for a moment.
type Generation struct {
	above    *folder // of all instances
	instance string
	clean    cleaner
	dir      *folder // of the generation, with its lock

	others bool      // folders of dead daemons have to stay, for now
	next   time.Time // look at them again then
}

const (
	currentLink = "current"
	newPrefix   = "new-" // and a number: what isn't published yet
	madeLink    = newPrefix + currentLink
)

// Claim mounts the BPF file system if it isn't, makes a folder for a new generation of the instance,
// takes its lock, and removes what generations of any instance left there that are dead. The caller calls
// Publish and Release.
//
// holds reports whether the map pinned at a path, of a dead daemon, has to stay for now; true also where that
// is not known.
func Claim(bpffs, instance string, holds func(path string) (bool, error), log *slog.Logger) (p *Generation, err error) {
	bpffs = cmp.Or(bpffs, defaultBPFFS)
	if err := mountBPFFS(bpffs); err != nil {
		return nil, err
	}
	p = &Generation{instance: pinName(instance), clean: cleaner{holds, log}}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
			p = nil
		}
	}()
	if p.above, err = openPinsFolder(bpffs, true); err != nil {
		return p, err
	}
	of, err := p.lockInstance()
	if err != nil {
		return p, err
	}
	for i := 1; p.dir == nil && err == nil; i++ {
		name := fmt.Sprint(newPrefix, i)
		if err = unix.Mkdirat(int(of.Fd()), name, 0o700); err == nil {
			p.dir, err = of.claim(name, false)
		} else if err == unix.EEXIST {
			err = nil
		} else {
			err = fmt.Errorf("make the folder for pinned maps %s: %w", filepath.Join(of.path, name), err)
		}
	}
	if err := errors.Join(err, of.close()); err != nil {
		return p, err
	}
	if p.others, err = p.clean.removeDead(p.above); err != nil {
		log.Warn("remove what dead daemons left", "error", err)
	}
	return p, nil
}

// lockInstance opens the instance's folder with its lock: until the caller closes it, names in it may be
// changed.
func (p *Generation) lockInstance() (of *folder, err error) { return p.above.await(p.instance, true) }

// await is claim for an instance's folder, whose lock is held for a moment by whoever has it: it waits up to
// 5 s for that.
func (f *folder) await(name string, create bool) (of *folder, err error) {
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		of, err = f.claim(name, create)
		if isGone := !create && errors.Is(err, unix.ENOENT); !isTaken(err) || isGone || time.Now().After(end) {
			return of, err
		}
	}
}

// Publish gives the generation its name, one more than that of the last one, and lets the link lead to it.
func (p *Generation) Publish() error {
	of, err := p.lockInstance()
	if err != nil {
		return err
	}
	defer of.close()
	names, err := of.names()
	if err != nil {
		return err
	}
	last := 0
	for _, name := range names {
		last = max(last, generation(name))
	}
	to, at := strconv.Itoa(last+1), int(of.Fd())
	if err := unix.Renameat2(at, filepath.Base(p.dir.path), at, to, unix.RENAME_NOREPLACE); err != nil {
		return fmt.Errorf("publish the pinned maps as %s: %w", filepath.Join(of.path, to), err)
	}
	p.dir.path = filepath.Join(of.path, to)
	return of.pointTo(to)
}

// generation is the number that is a generation's name, or 0 for any other name.
func generation(name string) int {
	if n, err := strconv.Atoi(name); err == nil && n > 0 && strconv.Itoa(n) == name {
		return n
	}
	return 0
}

// pointTo makes the link of an instance lead to a generation; "" removes it.
func (f *folder) pointTo(to string) error {
	at := int(f.Fd())
	var b [32]byte
	n, err := unix.Readlinkat(at, currentLink, b[:])
	switch {
	case err == unix.ENOENT && to == "", err == nil && string(b[:n]) == to:
		return nil
	case to == "":
		return f.remove(currentLink, 0)
	}
	if err := unix.Unlinkat(at, madeLink, 0); err != nil && err != unix.ENOENT { // one that was never renamed
		return &os.PathError{Op: "remove", Path: filepath.Join(f.path, madeLink), Err: err}
	}
	err = unix.Symlinkat(to, at, madeLink)
	if err == nil {
		err = unix.Renameat(at, madeLink, at, currentLink)
	}
	if err != nil {
		return fmt.Errorf("link %s: %w", filepath.Join(f.path, currentLink), err)
	}
	return nil
}

// RemoveDead removes the pins of daemons and self-tests that were killed, whatever their names, as each
// [Claim] does, for a process that loads nothing. Maps with bytes that a process has not read yet stay. Where
// this process may not see any pins it does nothing. bpffs is as of Claim.
func RemoveDead(bpffs string, holds func(path string) (bool, error), log *slog.Logger) error {
	above, err := openPinsFolder(cmp.Or(bpffs, defaultBPFFS), false)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EACCES) || errors.Is(err, errNotBPFFS) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = cleaner{holds, log}.removeDead(above)
	return errors.Join(err, above.close())
}

// VisitDead calls visit with the folder of each generation whose process is dead, the newest of an instance
// first. Nobody removes the folder meanwhile. Errors are joined. bpffs is as of Claim; there may be none.
func VisitDead(bpffs string, visit func(dir string) error) error {
	above, err := openPinsFolder(cmp.Or(bpffs, defaultBPFFS), false)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EACCES) || errors.Is(err, errNotBPFFS) {
		return nil
	}
	if err != nil {
		return err
	}
	defer above.close()
	names, err := above.names()
	errs := []error{err}
	for _, name := range names {
		of, err := above.await(name, false)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EACCES) {
			continue
		}
		if err == nil {
			err = errors.Join(of.visitDead(visit), of.close())
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// visitDead is VisitDead for one instance.
func (f *folder) visitDead(visit func(dir string) error) error {
	names, err := f.names()
	errs := []error{err}
	slices.SortFunc(names, func(a, b string) int { return generation(b) - generation(a) })
	for _, name := range names {
		if generation(name) == 0 {
			continue
		}
		dir, err := f.claim(name, false)
		if isTaken(err) {
			continue
		}
		if err == nil {
			err = errors.Join(visit(dir.path), dir.close())
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// cleaner removes what dead daemons left.
type cleaner struct {
	holds func(path string) (bool, error)
	log   *slog.Logger
}

// removeDead removes what dead daemons left in the folder of all instances. kept: something has to stay, for
// now.
func (c cleaner) removeDead(above *folder) (kept bool, err error) {
	names, err := above.names()
	if err != nil {
		return false, err
	}
	var errs []error
	for _, name := range names {
		of, err := above.claim(name, false)
		if isTaken(err) || errors.Is(err, unix.EACCES) {
			continue // somebody changes names there, or it is gone, or only root may see it
		}
		if err == nil {
			var k bool
			k, err = c.removeGenerations(of, "")
			kept = kept || k
			err = errors.Join(err, above.removeEmpty(of), of.close())
		}
		errs = append(errs, err)
	}
	return kept, errors.Join(errs...)
}

// removeGenerations removes the generations of an instance whose processes are dead, and the one called own,
// which is the caller's. The link leads to the newest that lives then, or is removed. f is the instance's
// folder, with its lock. kept: a map has to stay until it has been read. Where that can't be found out, the
// error says so, and kept leaves the map out.
func (c cleaner) removeGenerations(f *folder, own string) (kept bool, err error) {
	names, err := f.names()
	if err != nil {
		return false, err
	}
	newest := 0
	var errs []error
	for _, name := range names {
		switch {
		case name == madeLink:
			errs = append(errs, f.remove(name, 0))
			continue
		case generation(name) == 0 && !strings.HasPrefix(name, newPrefix): // the link
			continue
		}
		var dir *folder
		if name == own {
			dir, err = f.sub(name, false)
		} else {
			dir, err = f.claim(name, false)
		}
		if err == errHeld {
			newest = max(newest, generation(name))
			continue
		}
		if err == nil {
			var stays bool
			stays, err = c.clear(dir)
			kept = kept || stays && err == nil
			if !stays && err == nil {
				err = f.remove(name, unix.AT_REMOVEDIR)
				if err == nil && name != own {
					c.log.Info("what a daemon that was killed had left in the kernel is removed", "pins", dir.path)
				}
			}
			err = errors.Join(err, dir.close())
		}
		errs = append(errs, err)
	}
	to := ""
	if newest > 0 {
		to = strconv.Itoa(newest)
	}
	return kept, errors.Join(append(errs, f.pointTo(to))...)
}

// removeEmpty removes a folder in this one if there is nothing in it.
func (f *folder) removeEmpty(dir *folder) error {
	if err := f.remove(filepath.Base(dir.path), unix.AT_REMOVEDIR); !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	return nil
}

func openPinsFolder(bpffs string, create bool) (*folder, error) {
	root, err := openFolder(unix.AT_FDCWD, bpffs, bpffs)
	if err != nil {
		return nil, err
	}
	above, err := root.sub("tailsplice", create)
	return above, errors.Join(err, root.close())
}

// Pin pins maps by their names. They are seen from outside after Publish.
func (p *Generation) Pin(maps map[string]*ebpf.Map) error {
	for name, m := range maps {
		if err := m.Pin(filepath.Join(p.dir.path, name)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	return nil
}

// clear removes the pins in a folder, but for maps with bytes that a process has not read yet, or may have
// not: the error says why that is not known.
func (c cleaner) clear(f *folder) (kept bool, err error) {
	names, err := f.names()
	if err != nil {
		return true, err
	}
	var errs []error
	for _, name := range names {
		path := filepath.Join(f.path, name)
		holds, err := c.holds(path)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s may hold bytes that a process has not read yet, and stays: %w", path, err))
		}
		if holds {
			kept = true
		} else if err := f.remove(name, 0); err != nil && !errors.Is(err, unix.EISDIR) {
			errs = append(errs, err)
		}
	}
	return kept, errors.Join(errs...)
}

// Release removes the generation, and what is left of dead ones, from its instance. Maps with bytes that a
// process has not read yet stay.
func (p *Generation) Release() error {
	of, err := p.lockInstance()
	if err == nil {
		_, err = p.clean.removeGenerations(of, filepath.Base(p.dir.path))
		err = errors.Join(err, p.above.removeEmpty(of), of.close())
	}
	return errors.Join(err, p.close())
}

func (p *Generation) close() error { return errors.Join(p.dir.close(), p.above.close()) }

// Sweep removes what dead daemons left whose last byte has been read meanwhile. It gives up where that can't
// be found out. again: there is more, for a second from now.
func (p *Generation) Sweep(now time.Time) (again bool, err error) {
	if !p.others || now.Before(p.next) {
		return p.others, nil
	}
	p.next = now.Add(time.Second)
	p.others, err = p.clean.removeDead(p.above)
	return p.others, err
}

// folder is one of the BPF file system in which nobody but root and this user can change anything.
type folder struct {
	*os.File
	path string
}

// unsafeFolder says why a folder is not used: another user can change it, and could have the daemon remove
// and use what is not the daemon's.
type unsafeFolder struct{ path, why, advice string }

func (e *unsafeFolder) Error() string {
	return fmt.Sprintf("%s can't be used for pinned maps: %s: %s", e.path, e.why, e.advice)
}

var errNotBPFFS = errors.New("is not in a BPF file system")

// openFolder opens a folder in another one that was found safe, or the root of the file system.
func openFolder(at int, name, path string) (_ *folder, err error) {
	root := at == unix.AT_FDCWD
	flags := unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC
	if !root {
		flags |= unix.O_NOFOLLOW
	}
	fd, err := unix.Openat(at, name, flags, 0)
	if err == unix.ELOOP || err == unix.ENOTDIR {
		why := "it is no folder, but maybe a link to one that somebody else has made"
		return nil, &unsafeFolder{path, why, "look at it, and remove it (rm " + path + ")"}
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	f := &folder{os.NewFile(uintptr(fd), path), path}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.close())
		}
	}()
	var fs unix.Statfs_t
	var s unix.Stat_t
	if err := errors.Join(unix.Fstatfs(fd, &fs), unix.Fstat(fd, &s)); err != nil {
		return nil, fmt.Errorf("look at %s: %w", path, err)
	}
	if fs.Type != unix.BPF_FS_MAGIC {
		return nil, fmt.Errorf("%s %w", path, errNotBPFFS)
	}
	if s.Uid != 0 && int(s.Uid) != os.Geteuid() {
		advice := "look at it, and remove it (rm -r " + path + ")"
		if root {
			advice = "chown root " + path
		}
		return nil, &unsafeFolder{path, fmt.Sprintf("it belongs to the user %d", s.Uid), advice}
	}
	// In a file system that was mounted without a mode everybody may make folders, and not change those of
	// others.
	if s.Mode&0o022 != 0 && !(root && s.Mode&unix.S_ISVTX != 0) {
		why := fmt.Sprintf("other users may write to it (mode %#o)", s.Mode&0o7777)
		return nil, &unsafeFolder{path, why, "chmod 0700 " + path}
	}
	return f, nil
}

// sub opens a folder in this one. create: make it if it is not there.
func (f *folder) sub(name string, create bool) (*folder, error) {
	path := filepath.Join(f.path, name)
	if create {
		if err := unix.Mkdirat(int(f.Fd()), name, 0o700); err != nil && err != unix.EEXIST {
			return nil, fmt.Errorf("make the folder for pinned maps %s: %w", path, err)
		}
	}
	return openFolder(int(f.Fd()), name, path)
}

var errHeld = errors.New("another process has the folder for pinned maps")

// isTaken reports whether err says that somebody else has the folder, or had it and has removed it.
func isTaken(err error) bool { return err == errHeld || errors.Is(err, unix.ENOENT) }

// claim opens a folder in this one, as sub does, with its lock. An error for which isTaken is true says that
// another process has the lock, or has removed the folder meanwhile.
func (f *folder) claim(name string, create bool) (*folder, error) {
	d, err := f.sub(name, create)
	if err != nil {
		return nil, err
	}
	if err = unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == unix.EWOULDBLOCK {
		err = errHeld
	} else if err == nil {
		err = f.stillHas(name, d)
	}
	if err != nil {
		_ = d.close()
		return nil, err
	}
	return d, nil
}

// stillHas returns ENOENT if the folder called name is not d any more.
func (f *folder) stillHas(name string, d *folder) error {
	var its, there unix.Stat_t
	err := errors.Join(unix.Fstat(int(d.Fd()), &its),
		unix.Fstatat(int(f.Fd()), name, &there, unix.AT_SYMLINK_NOFOLLOW))
	if err == nil && its.Ino != there.Ino {
		err = unix.ENOENT
	}
	return err
}

func (f *folder) names() ([]string, error) {
	if _, err := f.Seek(0, 0); err != nil {
		return nil, err
	}
	return f.Readdirnames(-1)
}

func (f *folder) remove(name string, flags int) error {
	if err := unix.Unlinkat(int(f.Fd()), name, flags); err != nil {
		return &os.PathError{Op: "remove", Path: filepath.Join(f.path, name), Err: err}
	}
	return nil
}

func (f *folder) close() error {
	if f == nil {
		return nil
	}
	return f.Close()
}

func mountBPFFS(at string) error {
	var s unix.Statfs_t
	if err := unix.Statfs(at, &s); err != nil {
		if errors.Is(err, unix.ENOENT) {
			err = fmt.Errorf("%w: %s", err, adviseBPFFS(at))
		}
		return fmt.Errorf("look at %s: %w", at, err)
	}
	if s.Type == unix.BPF_FS_MAGIC {
		return nil
	}
	if err := unix.Mount("bpf", at, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC,
		"mode=0700"); err != nil {
		return fmt.Errorf("mount the BPF file system on %s (mount -t bpf bpf %s): %w", at, at, err)
	}
	return nil
}

// adviseBPFFS says what to do where there is not even a folder to mount the BPF file system on: sysfs has it.
func adviseBPFFS(at string) string {
	return "the kernel has no CONFIG_BPF_SYSCALL, or sysfs is not mounted" +
		" (mount -t sysfs sysfs /sys, then mount -t bpf bpf " + at + ")"
}

// pinName makes a name that bpffs accepts (it has no dots), another one for another instance.
func pinName(instance string) string {
	if instance == "" {
		return "default"
	}
	safe := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '-', r == '_':
			return r
		}
		return '-'
	}, instance)
	if len(safe) > 64 {
		safe = safe[:64]
	}
	if safe != instance {
		safe = fmt.Sprintf("%s-%08x", safe, crc32.ChecksumIEEE([]byte(instance)))
	}
	return safe
}

// ProbeBPFFS finds out whether pins can be in the BPF file system at a folder ("" = /sys/fs/bpf), for people.
// privileged: the process may load programs.
func ProbeBPFFS(at string, privileged bool) host.Finding {
	at = cmp.Or(at, defaultBPFFS)
	f := host.Finding{Name: "bpffs", State: host.StateOK, Detail: at}
	var s unix.Statfs_t
	if err := unix.Statfs(at, &s); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return f.Missing(at+" does not exist", adviseBPFFS(at))
		}
		return f.Missing(at+": "+err.Error(), "mount -t bpf bpf "+at)
	}
	if s.Type == unix.BPF_FS_MAGIC {
		above, err := openPinsFolder(at, false)
		_ = above.close()
		if e := new(unsafeFolder); errors.As(err, &e) {
			return f.Missing(e.path+" can't be used: "+e.why, e.advice)
		}
		if errors.Is(err, errNotBPFFS) {
			return f.Missing(err.Error(), "umount it")
		}
		return f
	}
	if host.Capable(unix.CAP_SYS_ADMIN) {
		f.Detail = at + " is not mounted; the daemon mounts it at start"
		return f
	}
	if !privileged {
		return f.Degraded(at+" is not mounted; a daemon that runs as root mounts it", "")
	}
	return f.Missing(at+" is not mounted", "mount -t bpf bpf "+at)
}
