package auth

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/bcrypt"
)

const (
	// MaxCost of a bcrypt hash: one check takes about 4 s. More is a mistake.
	MaxCost = 16
	// DefaultCost is of hashes that are made here: about 60 ms a check.
	DefaultCost = 10

	maxFileBytes = 1 << 20
	// lookEvery is how often a file is looked at for a change.
	lookEvery = time.Second
	// knownFor is how long a right password is remembered (as a keyed hash), so
	// that a page of fifty parts doesn't cost fifty checks.
	knownFor = 5 * time.Minute
	// knownMost bounds how many are.
	knownMost = 4096
)

// Users are those who have a password. Make them with [NewUsers] or [OpenUsers].
// Their methods may be called from any goroutine.
type Users struct {
	file string // "" for fixed users
	log  *slog.Logger
	key  [sha256.Size]byte

	compare func(hash, password []byte) error // bcrypt's, but in tests

	mu     sync.Mutex
	set    *set
	looked time.Time
	stamp  stamp
	failed string // the last complaint about the file
	known  map[passwordKey]time.Time
}

// set is one state of the users. It is immutable.
type set struct {
	hashes  map[string][]byte
	dummies [][]byte // which nothing matches, one of each cost from the least to the dearest
}

// stamp tells whether a file has changed.
type stamp struct {
	info os.FileInfo
}

func (s stamp) same(i os.FileInfo) bool {
	return s.info != nil && os.SameFile(s.info, i) && s.info.Size() == i.Size() && s.info.ModTime().Equal(i.ModTime())
}

// NewUsers makes users of names and their bcrypt hashes. An error names the
// user whose hash is none.
func NewUsers(hashes map[string]string) (*Users, error) {
	s, err := newSet(hashes)
	if err != nil {
		return nil, err
	}
	return newUsers(s, "", nil), nil
}

// OpenUsers reads a file of htpasswd -B: USER:HASH on each line, empty lines and
// those that # begins are skipped. It is read again when it changes; while it is
// wrong or missing the users stay as they were, and log hears of it once. There
// is nothing to close.
func OpenUsers(file string, log *slog.Logger) (*Users, error) {
	s, st, err := readFile(file)
	if err != nil {
		return nil, err
	}
	u := newUsers(s, file, log)
	u.stamp, u.looked = st, time.Now()
	return u, nil
}

func newUsers(s *set, file string, log *slog.Logger) *Users {
	u := &Users{file: file, log: log, compare: bcrypt.CompareHashAndPassword, set: s, known: map[passwordKey]time.Time{}}
	rand.Read(u.key[:]) // never fails (crypto/rand, Go 1.24)
	return u
}

func newSet(hashes map[string]string) (*set, error) {
	s := &set{hashes: make(map[string][]byte, len(hashes))}
	dearest := bcrypt.MinCost
	for name, hash := range hashes {
		cost, err := bcrypt.Cost([]byte(hash))
		switch {
		case err != nil || len(hash) != 60 || !strings.HasPrefix(hash, "$2"):
			return nil, fmt.Errorf("user %q has no bcrypt hash: make one with tailsplice hash-password, or htpasswd -B", name)
		case cost > MaxCost:
			return nil, fmt.Errorf("user %q: a bcrypt cost of %d is out of range, %d to %d", name, cost, bcrypt.MinCost, MaxCost)
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

func readFile(file string) (*set, stamp, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, stamp{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, stamp{}, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err != nil {
		return nil, stamp{}, err
	}
	if len(data) > maxFileBytes {
		return nil, stamp{}, fmt.Errorf("%s is larger than %d MiB", file, maxFileBytes>>20)
	}
	hashes, err := parse(string(data))
	if err != nil {
		return nil, stamp{}, fmt.Errorf("%s: %w", file, err)
	}
	s, err := newSet(hashes)
	if err != nil {
		return nil, stamp{}, fmt.Errorf("%s: %w", file, err)
	}
	return s, stamp{info}, nil
}

// parse reads the lines of an htpasswd file.
func parse(text string) (map[string]string, error) {
	hashes := map[string]string{}
	n := 0
	for line := range strings.Lines(text) {
		n++
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		name, hash, ok := strings.Cut(line, ":")
		switch {
		case !ok || name == "":
			return nil, fmt.Errorf("line %d: not USER:HASH", n)
		case hashes[name] != "":
			return nil, fmt.Errorf("line %d: user %q is there twice", n, name)
		}
		hashes[name] = hash
	}
	if len(hashes) == 0 {
		return nil, errors.New("no user is in it: add one with htpasswd -B FILE USER")
	}
	return hashes, nil
}

// Check reports whether password is user's. It takes as much work for a user
// that there is not as for a wrong password, tens of milliseconds; a password
// that was right a moment ago takes microseconds. Only a part of the CPUs checks
// at a time: strangers guess, and others have work to do. from is where the
// attempt comes from, the zero Prefix where that is not known: sources have their
// turns one after the other. The error is ctx's, which ended first, or a
// [*BusyError].
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

// keyOf stands for a password that was right. It holds the hash, so that a
// changed one is checked anew.
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
	if u.file == "" || time.Since(u.looked) < lookEvery {
		return u.set
	}
	u.looked = time.Now()
	if info, err := os.Stat(u.file); err == nil && u.stamp.same(info) {
		return u.set
	}
	s, st, err := readFile(u.file)
	if err != nil {
		if u.failed != err.Error() {
			u.failed = err.Error()
			u.log.Error("the file of users can't be used: those before the change stay in force", "file", u.file, "err", err)
		}
		return u.set
	}
	u.set, u.stamp, u.failed = s, st, ""
	clear(u.known)
	u.log.Info("the file of users was read again", "file", u.file, "users", len(s.hashes))
	return u.set
}

// Hash makes the bcrypt hash of a password. bcrypt looks at 72 bytes: longer
// passwords are an error.
func Hash(password string) (string, error) {
	if password == "" {
		return "", errors.New("the password is empty")
	}
	h, err := bcrypt.GenerateFromPassword([]byte(password), DefaultCost)
	if errors.Is(err, bcrypt.ErrPasswordTooLong) {
		return "", errors.New("the password is longer than 72 bytes, of which bcrypt takes no notice")
	}
	return string(h), err
}
