package loader

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// What came past TCP and the process has not read yet lives as long as its socket is in a sockmap. So the map
// of these sockets outlives the daemon, by its pin, while any of them has such bytes: the daemon that stops
// leaves it, and so does the next one that starts, under another name, until they have been read, or their
// sockets closed.
const (
	localsPin = "locals"
	unreadPin = "unread-" // and a number

	ethernetHeader = 14 // bytes
)

// holdsUnread: the pin is that of a map of sockets in which bytes wait for a process. True also where that
// can't be found out.
func (p *pins) holdsUnread(name string) (bool, error) {
	if name != localsPin && !strings.HasPrefix(name, unreadPin) {
		return false, nil
	}
	m, err := ebpf.LoadPinnedMap(p.path(name), nil)
	if err != nil {
		return true, fmt.Errorf("open the pinned map: %w", err)
	}
	defer m.Close()
	if m.Type() != ebpf.SockHash {
		return false, nil
	}
	return anyUnread(m)
}

func anyUnread(sockets *ebpf.Map) (bool, error) {
	spec, err := loadLocal()
	if err != nil {
		return true, fmt.Errorf("read the BPF object: %w", err)
	}
	spec.Maps["locals"].MaxEntries = sockets.MaxEntries() // it may be that of another version
	var o struct {
		Unread *ebpf.Program `ebpf:"unread"`
	}
	err = spec.LoadAndAssign(&o, &ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{"locals": sockets}})
	if err != nil {
		return true, fmt.Errorf("load the program that looks at sockets: %w", translate(err))
	}
	defer o.Unread.Close()
	key := make([]byte, sockets.KeySize())
	last := any(nil)
	// A key that is gone meanwhile is followed by the first one.
	for range 4 * sockets.MaxEntries() {
		if err := sockets.NextKey(last, key); errors.Is(err, ebpf.ErrKeyNotExist) {
			return false, nil
		} else if err != nil {
			return true, fmt.Errorf("look through the sockets: %w", err)
		}
		waits, err := o.Unread.Run(&ebpf.RunOptions{Data: append(make([]byte, ethernetHeader), key...)})
		if err != nil || waits != 0 {
			return true, err
		}
		last = bytes.Clone(key)
	}
	return true, errors.New("look through the sockets: they change too fast")
}

// keep gives the map of sockets of a daemon that has ended a name that no other one has.
func (p *pins) keep(name string) error {
	if name != localsPin {
		return nil
	}
	at := int(p.dir.Fd())
	for i := 1; ; i++ {
		to := fmt.Sprint(unreadPin, i)
		if err := unix.Fstatat(at, to, &unix.Stat_t{}, unix.AT_SYMLINK_NOFOLLOW); err == unix.ENOENT {
			return unix.Renameat(at, name, at, to)
		} else if err != nil {
			return err
		}
	}
}

// sweep removes the pins of maps whose last byte has been read meanwhile. It gives up where that can't be found out.
func (p *pins) sweep(now time.Time, log *slog.Logger) (err error) {
	if !p.kept && !p.others || now.Before(p.next) {
		return nil
	}
	p.next = now.Add(sweepEvery)
	if p.kept {
		err = p.clear(func(name string) bool { return strings.HasPrefix(name, unreadPin) })
		if p.unsure != nil {
			p.kept = false
		}
		err = errors.Join(err, p.unsure)
	}
	if p.others {
		var e error
		p.others, e = removeDead(p.above, log)
		err = errors.Join(err, e)
	}
	return err
}
