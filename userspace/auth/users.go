package auth

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/tailsplice/tailsplice/userspace/filestamp"
)

const (
	MaxCost     = 16 // of a bcrypt hash: one check takes about 4 s. More is a mistake.
	DefaultCost = 10 // of hashes made here: about 60 ms a check

	maxFileBytes = 1 << 20
	// knownFor is how long a right password is remembered (as a keyed hash), so
	// that a page of fifty parts doesn't cost fifty checks.
	knownFor  = 5 * time.Minute
	knownMost = 4096 // bounds how many are
)

// Users are those who have a password. Make them with [NewUsers] or [OpenUsers].
// Their methods may be called from any goroutine.
type Users struct {
	file string // "" for fixed users
	log  *slog.Logger
	key  [sha256.Size]byte

	compare func(hash, password []byte) error // bcrypt's, but in tests

	mu     sync.Mutex
	set    *set                      // +checklocks:mu
	looked time.Time                 // +checklocks:mu
	info   os.FileInfo               // +checklocks:mu
	known  map[passwordKey]time.Time // +checklocks:mu
	// +checklocks:mu
	failed string // the last complaint about the file
}

// set is one state of the users. It is immutable.
type set struct {
	hashes  map[string][]byte
	dummies [][]byte // which nothing matches, one of each cost from the least to the dearest
}

// NewUsers makes users of names and their bcrypt hashes. An error names the user whose hash is none.
func NewUsers(hashes map[string]string) (*Users, error) {
	s, err := newSet(hashes)
	if err != nil {
		return nil, err
	}
	return newUsers(s, "", nil, nil), nil
}

// OpenUsers reads a file of htpasswd -B: USER:HASH on each line; empty lines and lines that begin with # are
// skipped. It is read again when it changes. A user that is gone from it, or whose line is wrong, has no
// password any more; once the file is empty or gone nobody has one. While it can't be read the users stay as
// they were. Either is logged once. There is nothing to close.
func OpenUsers(file string, log *slog.Logger) (*Users, error) {
	s, info, bad, err := readFile(file)
	if err = errors.Join(append(bad, err)...); err != nil {
		return nil, err
	}
	return newUsers(s, file, info, log), nil
}

func newUsers(s *set, file string, info os.FileInfo, log *slog.Logger) *Users {
	u := &Users{file: file, log: log, compare: bcrypt.CompareHashAndPassword, set: s, info: info, looked: time.Now(),
		known: map[passwordKey]time.Time{}}
	rand.Read(u.key[:]) // never fails (crypto/rand, Go 1.24)
	return u
}

func newSet(hashes map[string]string) (*set, error) {
	s := &set{hashes: make(map[string][]byte, len(hashes))}
	dearest := bcrypt.MinCost
	for name, hash := range hashes {
		cost, err := costOf(name, hash)
		if err != nil {
			return nil, err
		}
		dearest = max(dearest, cost)
		s.hashes[name] = []byte(hash)
	}
	// Any salt and any hash will do: nothing matches it but what nobody knows.
	for cost := bcrypt.MinCost; cost <= dearest; cost++ {
		s.dummies = append(s.dummies, fmt.Appendf(nil, "$2a$%02d$%s", cost, strings.Repeat(".", 22)+strings.Repeat("/", 31)))
	}
	return s, nil
}

func costOf(name, hash string) (int, error) {
	cost, err := bcrypt.Cost([]byte(hash))
	switch {
	case err != nil || len(hash) != 60 || !strings.HasPrefix(hash, "$2"):
		return 0, fmt.Errorf("user %q has no bcrypt hash: make one with tailsplice hash-password, or htpasswd -B", name)
	case cost > MaxCost:
		return 0, fmt.Errorf("user %q: a bcrypt cost of %d is out of range, %d to %d", name, cost, bcrypt.MinCost, MaxCost)
	}
	return cost, nil
}

// readFile reads the users of a file. bad is what is wrong with its lines; they are left out.
func readFile(file string) (s *set, info os.FileInfo, bad []error, err error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, nil, nil, err
	}
	defer f.Close()
	info, err = f.Stat()
	if err != nil {
		return nil, nil, nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	switch {
	case err != nil:
		return nil, nil, nil, err
	case len(data) > maxFileBytes:
		return nil, nil, nil, fmt.Errorf("%s is larger than %d MiB", file, maxFileBytes>>20)
	}
	hashes, bad := parse(string(data))
	for i := range bad {
		bad[i] = fmt.Errorf("%s: %w", file, bad[i])
	}
	s, err = newSet(hashes)
	return s, info, bad, err
}

// parse reads the lines of an htpasswd file. What is wrong with a line doesn't hold for the others; of two
// lines of a user neither counts.
func parse(text string) (hashes map[string]string, bad []error) {
	hashes = map[string]string{}
	seen := map[string]bool{}
	n := 0
	for line := range strings.Lines(text) {
		n++
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		name, hash, ok := strings.Cut(line, ":")
		switch _, err := costOf(name, hash); {
		case !ok || name == "":
			bad = append(bad, fmt.Errorf("line %d: not USER:HASH", n))
		case seen[name]:
			bad = append(bad, fmt.Errorf("line %d: user %q appears twice", n, name))
			delete(hashes, name)
		case err != nil:
			bad = append(bad, fmt.Errorf("line %d: %w", n, err))
		default:
			hashes[name] = hash
		}
		seen[name] = true
	}
	if len(hashes) == 0 && len(bad) == 0 {
		bad = append(bad, errors.New("it has no users: add one with htpasswd -B FILE USER"))
	}
	return hashes, bad
}

// Check reports whether password is user's. It takes as much work for a user that there is not as for a wrong
// password, tens of milliseconds; a password that was right a moment ago takes microseconds. Only a part of
// the CPUs checks at a time: strangers guess, and others have work to do. from is where the attempt comes
// from, the zero Prefix where that is not known: sources have their turns one after the other. The error is
// ctx's, which ended first, or a [*BusyError].
func (u *Users) Check(ctx context.Context, from netip.Prefix, user, password string) (bool, error) {
	s := u.current()
	hash, ok := s.hashes[user]
	if !ok {
		hash = s.dummies[len(s.dummies)-1]
	}
	key := u.keyOf(user, password, hash)
	if u.remembers(key) {
		return true, nil
	}
	return checks.try(ctx, from, key, func() bool {
		if u.remembers(key) { // another source has the same one
			return true
		}
		right := u.compare(hash, []byte(password)) == nil && ok
		if right {
			u.remember(key)
			return true
		}
		s.even(hash, func(dummy []byte) { _ = u.compare(dummy, []byte(password)) })
		return false
	})
}

// even does what is missing from the work on hash to that on the dearest: each
// step of cost is twice the work of the one before.
func (s *set) even(hash []byte, work func(dummy []byte)) {
	cost, _ := bcrypt.Cost(hash) // newSet has looked
	for _, dummy := range s.dummies[cost-bcrypt.MinCost : len(s.dummies)-1] {
		work(dummy)
	}
}

// checks are those of the whole process.
var checks = newTurns(max(1, runtime.GOMAXPROCS(0)/2))

// keyOf stands for a password that was right. It holds the hash, so that a changed one is checked anew.
func (u *Users) keyOf(user, password string, hash []byte) (key passwordKey) {
	h := hmac.New(sha256.New, u.key[:])
	for _, part := range [][]byte{[]byte(user), []byte(password), hash} {
		fmt.Fprintf(h, "%d:", len(part))
		h.Write(part)
	}
	h.Sum(key[:0])
	return key
}

func (u *Users) remembers(key passwordKey) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	at, ok := u.known[key]
	return ok && time.Since(at) < knownFor
}

func (u *Users) remember(key passwordKey) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.known) >= knownMost {
		clear(u.known)
	}
	u.known[key] = time.Now()
}

// current is the set of users now.
func (u *Users) current() *set {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.file == "" || time.Since(u.looked) < filestamp.Every {
		return u.set
	}
	u.looked = time.Now()
	if now, err := os.Stat(u.file); err == nil && filestamp.Same(now, u.info) {
		return u.set
	}
	s, info, bad, err := readFile(u.file)
	consequence := "those users have no password"
	switch {
	case errors.Is(err, fs.ErrNotExist):
		s, _ = newSet(nil)
		consequence = "nobody has a password"
	case err != nil:
		s, info = u.set, u.info
		consequence = "the previous ones stay in force"
	case len(s.hashes) == 0:
		consequence = "nobody has a password"
	}
	if s != u.set {
		clear(u.known)
	}
	u.set, u.info = s, info
	if err = errors.Join(append(bad, err)...); err != nil {
		if u.failed != err.Error() {
			u.failed = err.Error()
			u.log.Error("the file of users can't be used as it is: "+consequence, "file", u.file, "err", err)
		}
		return u.set
	}
	u.failed = ""
	u.log.Info("the file of users was read again", "file", u.file, "users", len(s.hashes))
	return u.set
}

// Hash makes the bcrypt hash of a password. bcrypt looks at 72 bytes: longer passwords are an error.
func Hash(password string) (string, error) {
	if password == "" {
		return "", errors.New("the password is empty")
	}
	h, err := bcrypt.GenerateFromPassword([]byte(password), DefaultCost)
	if errors.Is(err, bcrypt.ErrPasswordTooLong) {
		return "", errors.New("the password is longer than 72 bytes, and bcrypt ignores the rest")
	}
	return string(h), err
}
