package loader

import (
	"cmp"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const defaultBPFFS = "/sys/fs/bpf"

// pins is the folder in the BPF file system that an instance holds, with a lock that dies with the process.
type pins struct {
	above *folder // of all instances
	dir   *folder // with the lock

	// Of maps that a daemon which has ended left for processes to read.
	kept   bool
	others bool      // likewise, in the folders of daemons that are dead
	next   time.Time // look at them again then
	unsure error     // why it is not known whether they have to be
}

// claimPins mounts the BPF file system if it isn't, makes the instance's folder, takes its lock, and removes
// what instances that died left there and in folders of theirs, but for bytes that a process has not read
// yet.
func claimPins(bpffs, instance string, log *slog.Logger) (p *pins, err error) {
	bpffs = cmp.Or(bpffs, defaultBPFFS)
	if err := mountBPFFS(bpffs); err != nil {
		return nil, err
	}
	p = &pins{}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
			p = nil
		}
	}()
	if p.above, err = openPinsFolder(bpffs, true); err != nil {
		return p, err
	}
	// Who looks whether it is left over may have it for a moment, and remove it.
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if p.dir, err = p.above.claim(pinName(instance), true); !isTaken(err) || time.Now().After(end) {
			break
		}
	}
	if err == errHeld {
		err = fmt.Errorf("%s/%s belongs to another daemon that runs; give this one another instance name: "+
			"it comes from control.socket", p.above.path, pinName(instance))
	}
	if err != nil {
		return p, err
	}
	if err := p.clear(all); err != nil {
		return p, fmt.Errorf("remove what an ended daemon left: %w", err)
	}
	if p.others, err = removeDead(p.above, log); err != nil {
		log.Warn("remove what dead daemons left", "error", err)
	}
	return p, nil
}

// RemoveDead removes the pins of daemons and self-tests that were killed, whatever their names, as each [New]
// does, for a process that loads nothing. Maps with bytes that a process has not read yet stay. Where this
// process may not see any pins it does nothing. bpffs is as in [Options].
func RemoveDead(bpffs string, log *slog.Logger) error {
	above, err := openPinsFolder(cmp.Or(bpffs, defaultBPFFS), false)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EACCES) || errors.Is(err, errNotBPFFS) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = removeDead(above, log)
	return errors.Join(err, above.close())
}

// removeDead is RemoveDead below a folder. kept: something has to stay, for now.
func removeDead(above *folder, log *slog.Logger) (kept bool, err error) {
	names, err := above.names()
	if err != nil {
		return false, err
	}
	var errs []error
	for _, name := range names {
		dir, err := above.claim(name, false)
		if isTaken(err) || errors.Is(err, unix.EACCES) {
			continue // a daemon that lives, or nothing any more, or what only root may see
		}
		if err == nil {
			p := &pins{above: above, dir: dir}
			err = errors.Join(p.remove(), p.unsure, dir.close())
			kept = kept || p.kept && p.unsure == nil
			if err == nil && !p.kept {
				log.Info("what a daemon that was killed had left in the kernel is removed", "pins", dir.path)
			}
		}
		errs = append(errs, err)
	}
	return kept, errors.Join(errs...)
}

func openPinsFolder(bpffs string, create bool) (*folder, error) {
	root, err := openFolder(unix.AT_FDCWD, bpffs, bpffs)
	if err != nil {
		return nil, err
	}
	above, err := root.sub("tailsplice", create)
	return above, errors.Join(err, root.close())
}

func (p *pins) path(name string) string { return filepath.Join(p.dir.path, name) }

// clear removes the pins that which is true for, and keeps those of maps with bytes that a process has not
// read yet.
func (p *pins) clear(which func(name string) bool) error {
	old, err := p.dir.names()
	if err != nil {
		return err
	}
	p.kept, p.unsure = false, nil
	var errs []error
	for _, name := range old {
		if !which(name) {
			continue
		}
		holds, err := p.holdsUnread(name)
		if err != nil {
			p.unsure = fmt.Errorf("%s may hold bytes that a process has not read yet, and stays: %w",
				p.path(name), err)
		}
		if holds {
			p.kept = true
			errs = append(errs, p.keep(name))
		} else {
			errs = append(errs, p.dir.remove(name, 0))
		}
	}
	return errors.Join(errs...)
}

func all(string) bool { return true }

// remove is clear of all, and of the folder. The lock is held: nobody has pinned anything here since.
func (p *pins) remove() error {
	err := p.clear(all)
	if !p.kept {
		err = errors.Join(err, p.above.remove(filepath.Base(p.dir.path), unix.AT_REMOVEDIR))
	}
	return err
}

func (p *pins) release() error { return errors.Join(p.remove(), p.unsure, p.close()) }

func (p *pins) close() error { return errors.Join(p.dir.close(), p.above.close()) }

// folder is one of the BPF file system in which nobody but root and this user can change anything.
type folder struct {
	*os.File
	path string
}

// unsafeFolder is why a folder is none: whoever else can change it can have the daemon remove and take what
// is not its own.
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

var errHeld = errors.New("another process has it")

// isTaken: somebody else has the folder, or had it and has removed it.
func isTaken(err error) bool { return err == errHeld || errors.Is(err, unix.ENOENT) }

// claim is sub with the folder's lock.
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

// stillHas is ENOENT if the name is not d's any more.
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
