package loader

import (
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const defaultBPFFS = "/sys/fs/bpf"

// pins is the folder in the BPF file system that an instance holds, with a lock that dies with the process.
type pins struct {
	dir  string
	lock *os.File
}

// claimPins mounts the BPF file system if it isn't, makes the instance's folder, takes its lock, and
// removes what an instance that died left in it.
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
	if err := p.clear(); err != nil {
		return nil, errors.Join(fmt.Errorf("remove what a dead daemon left: %w", err), lock.Close())
	}
	return p, nil
}

func (p *pins) path(name string) string { return filepath.Join(p.dir, name) }

func (p *pins) clear() error {
	old, err := os.ReadDir(p.dir)
	if err != nil {
		return err
	}
	for _, e := range old {
		if err := os.Remove(p.path(e.Name())); err != nil {
			return err
		}
	}
	return nil
}

func (p *pins) release() error {
	err := p.clear()
	// The lock is still held: nobody has pinned anything here since.
	return errors.Join(err, os.Remove(p.dir), p.lock.Close())
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
