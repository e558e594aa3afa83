package main

import (
	"errors"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	beat     = 30 * time.Second // within which tailsplice says that it serves, once it has said so
	abortFor = 10 * time.Second // how long it may take to write what its goroutines do
	mostKept = 512              // descriptors
)

// keeper is for tailsplice what systemd is elsewhere, by the protocol of sd_notify(3): it keeps sockets for
// the process that is started after a crash, and knows which process is the main one.
type keeper struct {
	path string
	conn *net.UnixConn
	main chan int // gets the process that has taken over

	mu   sync.Mutex
	kept []keptFile
	fed  time.Time // when tailsplice has said that it serves; zero: not yet
}

// keptFile is a descriptor, and what tailsplice calls it.
type keptFile struct {
	name string
	*os.File
}

// newKeeper listens at a socket in a folder.
func newKeeper(dir string) (*keeper, error) {
	path := filepath.Join(dir, "notify")
	os.Remove(path)
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	k := &keeper{path: path, conn: conn, main: make(chan int, 8)}
	go k.listen()
	return k, nil
}

// forgetMain drops what processes have said that have ended.
func (k *keeper) forgetMain() {
	for {
		select {
		case <-k.main:
		default:
			return
		}
	}
}

// listen hears what tailsplice says, until the socket is closed.
func (k *keeper) listen() {
	for {
		b, oob := make([]byte, 4096), make([]byte, 4096)
		n, oobn, _, _, err := k.conn.ReadMsgUnix(b, oob)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			log.Printf("tailsplice can't be heard: %v", err)
			time.Sleep(time.Second)
			continue
		}
		k.hear(string(b[:n]), received(oob[:oobn]))
	}
}

// received are the descriptors of a control message.
func received(oob []byte) (files []*os.File) {
	messages, _ := syscall.ParseSocketControlMessage(oob)
	for _, m := range messages {
		fds, _ := syscall.ParseUnixRights(&m)
		for _, fd := range fds {
			syscall.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "kept"))
		}
	}
	return files
}

// hear does what a message says, and owns its files.
func (k *keeper) hear(text string, files []*os.File) {
	said := map[string]string{}
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		said[key] = value
	}
	if pid, err := strconv.Atoi(said["MAINPID"]); err == nil && pid > 0 {
		k.main <- pid
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if said["WATCHDOG"] == "1" {
		k.fed = time.Now()
	}
	name := said["FDNAME"]
	if said["FDSTOREREMOVE"] == "1" {
		k.kept = slices.DeleteFunc(k.kept, func(f keptFile) bool {
			if f.name == name {
				f.Close()
			}
			return f.name == name
		})
	}
	for _, f := range files {
		isNew := said["FDSTORE"] == "1" && len(k.kept) < mostKept && name != "" && !strings.Contains(name, ":") &&
			!slices.ContainsFunc(k.kept, func(o keptFile) bool { return isSame(o.File, f) })
		if isNew {
			k.kept = append(k.kept, keptFile{name, f})
		} else {
			f.Close()
		}
	}
}

func isSame(a, b *os.File) bool {
	x, err := a.Stat()
	y, err2 := b.Stat()
	return err == nil && err2 == nil && os.SameFile(x, y)
}

// environ is what tailsplice is told of the keeper. LISTEN_PID comes later, as it is its own number.
func (k *keeper) environ() (env []string, files []*os.File) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.fed = time.Time{}
	var names []string
	for _, f := range k.kept {
		names = append(names, f.name)
		files = append(files, f.File)
	}
	return []string{"NOTIFY_SOCKET=" + k.path, fmt.Sprintf("WATCHDOG_USEC=%d", beat.Microseconds()),
		fmt.Sprintf("LISTEN_FDS=%d", len(files)), "LISTEN_FDNAMES=" + strings.Join(names, ":")}, files
}

// heard says whether tailsplice has said that it serves since it was started.
func (k *keeper) heard() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return !k.fed.IsZero()
}

// hangs says whether tailsplice should have said by now that it serves.
func (k *keeper) hangs() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return !k.fed.IsZero() && time.Since(k.fed) > beat
}

// drop closes what is kept, for all who have it: nobody is to wait for a next process.
func (k *keeper) drop() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, f := range k.kept {
		if raw, err := f.SyscallConn(); err == nil {
			raw.Control(func(fd uintptr) { syscall.Shutdown(int(fd), syscall.SHUT_RDWR) })
		}
		f.Close()
	}
	k.kept = nil
}

// execute replaces this process, which gets the descriptors of environ, by a program.
func execute(argv []string) error {
	os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
	return syscall.Exec(argv[0], argv, os.Environ())
}
