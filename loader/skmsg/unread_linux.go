package skmsg

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/cilium/ebpf"

	"github.com/tailsplice/tailsplice/loader/host"
)

// What came past TCP and the process has not read yet lives as long as its socket is in a sockmap. So the map
// of these sockets outlives the daemon, by its pin, while any of them has such bytes: the daemon that stops
// leaves it, and so does the next one that starts, until they have been read, or their sockets closed.
const (
	localsPin      = "locals"
	ethernetHeader = 14 // bytes
)

// HoldsUnread reports whether the pin at path is that of a map of sockets in which bytes wait for a process.
// It is true with an error, which says why that can't be found out. It is for pins.Claim.
func HoldsUnread(path string) (bool, error) {
	if filepath.Base(path) != localsPin {
		return false, nil
	}
	m, err := ebpf.LoadPinnedMap(path, nil)
	if err != nil {
		return true, fmt.Errorf("open the pinned map: %w", err)
	}
	defer m.Close()
	if m.Type() != ebpf.SockHash {
		return false, nil
	}
	return anyUnread(m)
}

// anyUnread is HoldsUnread for an open map.
func anyUnread(sockets *ebpf.Map) (bool, error) {
	spec, err := loadSkmsg()
	if err != nil {
		return true, fmt.Errorf("read the BPF object: %w", err)
	}
	spec.Maps["locals"].MaxEntries = sockets.MaxEntries() // it may be that of another version
	var o struct {
		Unread *ebpf.Program `ebpf:"query_unread"`
	}
	err = spec.LoadAndAssign(&o, &ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{"locals": sockets}})
	if err != nil {
		return true, fmt.Errorf("load the program that looks at sockets: %w", host.Translate(err))
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
