package loader

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// What came past TCP and the process has not read yet lives as long as its socket is in a sockmap. So the map
// of these sockets outlives the daemon, by its pin, while any of them has such bytes: the daemon that stops
// leaves it, and so does the next one that starts, under another name, until they have been read, or their
// sockets closed.
const (
	localsPin = "locals"
	unreadPin = "unread-" // and a number
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
	var o struct {
		Unread *ebpf.Program `ebpf:"unread"`
	}
	if err := spec.LoadAndAssign(&o, nil); err != nil {
		return true, fmt.Errorf("load the iterator of sockets: %w", translate(err))
	}
	defer o.Unread.Close()
	it, err := link.AttachIter(link.IterOptions{Program: o.Unread, Map: sockets})
	if err != nil {
		return true, fmt.Errorf("attach the iterator of sockets: %w", translate(err))
	}
	defer it.Close()
	r, err := it.Open()
	if err != nil {
		return true, fmt.Errorf("open the iterator of sockets: %w", err)
	}
	defer r.Close()
	_, err = r.Read(make([]byte, 1)) // the program prints nothing
	if err == io.EOF {
		return false, nil
	}
	if !isAgain(err) {
		return true, fmt.Errorf("read the iterator of sockets: %w", err)
	}
	return true, nil
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
