package loader

import (
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const defaultBPFFS = "/sys/fs/bpf"

// pins is the folder in the BPF file system that an instance holds, with a lock that dies with the process.
type pins struct {
	dir  string
	lock *os.File

	// Of maps that a daemon which has ended left for processes to read.
	kept   bool
	next   time.Time // look at them again then
	unsure error     // why it is not known whether they have to be
}

// claimPins mounts the BPF file system if it isn't, makes the instance's folder, takes its lock, and
// removes what an instance that died left in it, but for bytes that a process has not read yet.
func claimPins(bpffs, instance string) (*pins, error) {
	if bpffs == "" {
		bpffs = defaultBPFFS
	}
	if err := mountBPFFS(bpffs); err != nil {
		return nil, err
	}
	dir := filepath.Join(bpffs, "tailsplice", pinName(instance))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the folder for pinned maps: %w", err)
	}
	lock, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open the folder for pinned maps: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		err = fmt.Errorf("%s belongs to another daemon that runs; give this one another instance name: it comes from control.socket", dir)
		return nil, errors.Join(err, lock.Close())
	}
	p := &pins{dir: dir, lock: lock}
	if err := p.clear(all); err != nil {
		return nil, errors.Join(fmt.Errorf("remove what a dead daemon left: %w", err), lock.Close())
	}
	return p, nil
}

func (p *pins) path(name string) string { return filepath.Join(p.dir, name) }

// clear removes the pins that which is true for, and keeps those of maps with bytes that a process has not read yet.
func (p *pins) clear(which func(name string) bool) error {
	old, err := os.ReadDir(p.dir)
	if err != nil {
		return err
	}
	p.kept, p.unsure = false, nil
	var errs []error
	for _, e := range old {
		name := e.Name()
		if !which(name) {
			continue
		}
		holds, err := p.holdsUnread(name)
		if err != nil {
			p.unsure = fmt.Errorf("%s may hold bytes that a process has not read yet, and stays: %w", p.path(name), err)
		}
		if holds {
			p.kept = true
			errs = append(errs, p.keep(name))
		} else {
			errs = append(errs, os.Remove(p.path(name)))
		}
	}
	return errors.Join(errs...)
}

func all(string) bool { return true }

func (p *pins) release() error {
	err := p.clear(all)
	if !p.kept { // the lock is still held: nobody has pinned anything here since
		err = errors.Join(err, os.Remove(p.dir))
	}
	return errors.Join(err, p.unsure, p.lock.Close())
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
	if err := unix.Mount("bpf", at, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("mount the BPF file system on %s (mount -t bpf bpf %s): %w", at, at, err)
	}
	return nil
}

// adviseBPFFS says what to do where there is not even a folder to mount the BPF file system on: sysfs has it.
func adviseBPFFS(at string) string {
	return "the kernel has no CONFIG_BPF_SYSCALL, or sysfs is not mounted (mount -t sysfs sysfs /sys, then mount -t bpf bpf " + at + ")"
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
