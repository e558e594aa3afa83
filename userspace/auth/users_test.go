package auth

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/tailsplice/tailsplice/test/logs"
)

// fromHtpasswd is "secret", by `htpasswd -nbB me secret`.
const fromHtpasswd = "$2y$05$c1TTfQsxwFnIrEOLjIgnIeXJBpkCKnQ9Tn8EHPJLPMrgYRdOFM8Ve"

func hash(t testing.TB, password string) string {
	t.Helper()
	h, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	return string(h)
}

func check(t testing.TB, u *Users, user, password string) bool {
	t.Helper()
	ok, err := u.Check(t.Context(), netip.Prefix{}, user, password)
	if err != nil {
		t.Fatal(err)
	}
	return ok
}

func TestCheck(t *testing.T) {
	u, err := NewUsers(map[string]string{"me": hash(t, "secret"), "jürgen": hash(t, "pässwort"), "2y": strings.Replace(hash(t, "x"), "$2a$", "$2y$", 1)})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		user, password string
		want           bool
	}{
		{"me", "secret", true}, {"me", "secret", true}, {"me", "Secret", false}, {"me", "", false}, {"ME", "secret", false}, {"", "", false},
		{"nobody", "secret", false}, {"jürgen", "pässwort", true}, {"2y", "x", true}, {"2y", "secret", false}, {"me", strings.Repeat("x", 1000), false},
	} {
		if got := check(t, u, c.user, c.password); got != c.want {
			t.Errorf("%q with %q: %v", c.user, c.password, got)
		}
	}
}

// TestHtpasswd uses what Apache's tool makes.
func TestHtpasswd(t *testing.T) {
	tool, err := exec.LookPath("htpasswd")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("htpasswd is not installed")
		}
		t.Skip("htpasswd is not installed")
	}
	file := filepath.Join(t.TempDir(), "users")
	if out, err := exec.Command(tool, "-cbB", file, "me", "secret").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	u, err := OpenUsers(file, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if !check(t, u, "me", "secret") || check(t, u, "me", "wrong") {
		t.Error("a file of htpasswd -B is not understood")
	}
}

// TestUnknownUser checks that the work for a user that there is not is that for
// one that there is: as dear a hash, which nothing matches.
func TestUnknownUser(t *testing.T) {
	dear, err := bcrypt.GenerateFromPassword([]byte("x"), 6)
	if err != nil {
		t.Fatal(err)
	}
	middle, err := bcrypt.GenerateFromPassword([]byte("x"), 5)
	if err != nil {
		t.Fatal(err)
	}
	u, err := NewUsers(map[string]string{"cheap": hash(t, "x"), "middle": string(middle), "dear": string(dear)})
	if err != nil {
		t.Fatal(err)
	}
	work := 0
	u.compare = func(hash, password []byte) error {
		cost, err := bcrypt.Cost(hash)
		if err != nil {
			t.Error(err)
		}
		work += 1 << cost
		err = bcrypt.CompareHashAndPassword(hash, password)
		if err != bcrypt.ErrMismatchedHashAndPassword {
			t.Errorf("no work is done: %v", err)
		}
		return err
	}
	for _, user := range []string{"cheap", "middle", "dear", "nobody"} {
		for _, password := range []string{"wrong", "", strings.Repeat("x", 100)} {
			work = 0
			if check(t, u, user, password) {
				t.Errorf("%s with %.5q is let in", user, password)
			}
			if work != 1<<6 {
				t.Errorf("the work on %s with %.5q is %d, that of the dearest user %d", user, password, work, 1<<6)
			}
		}
	}
}

// TestCheckWaits checks that who waits for others' checks can leave.
//
// +checklocksignore
func TestCheckWaits(t *testing.T) {
	u, err := NewUsers(map[string]string{"me": hash(t, "secret")})
	if err != nil {
		t.Fatal(err)
	}
	slots := checks.free
	checks.free = 0
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if ok, err := u.Check(ctx, netip.Prefix{}, "me", "secret"); ok || err == nil {
		t.Errorf("%v, %v", ok, err)
	}
	checks.free = slots
	if !check(t, u, "me", "secret") {
		t.Error("refused")
	}
}

func TestParse(t *testing.T) {
	h := hash(t, "x")
	for _, c := range []struct{ text, err string }{
		{"# people\n\nme:" + h + "\r\nyou:" + h, ""},
		{"", "no user"}, {"me\n", "line 1: not USER:HASH"}, {":x", "line 1: not"}, {"me:" + h + "\nme:" + h, `line 2: user "me" appears twice`},
		{"me:$apr1$x$y", `user "me" has no bcrypt hash`}, {"me:" + h + ":more", "no bcrypt hash"}, {"me:" + strings.Replace(h, "$04$", "$31$", 1), "out of range"},
	} {
		_, bad := parse(c.text)
		err := errors.Join(bad...)
		if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%q: %v, want %q", c.text, err, c.err)
		}
		if err != nil && strings.Contains(err.Error(), h) {
			t.Errorf("the message shows a hash: %v", err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("me:" + fromHtpasswd + "\n#\n")
	f.Fuzz(func(t *testing.T, text string) {
		hashes, bad := parse(text)
		if len(hashes) == 0 && len(bad) == 0 {
			t.Error("nobody")
		}
		if _, err := newSet(hashes); err != nil {
			t.Error(err)
		}
	})
}

// TestReload changes the file, breaks it and removes it.
func TestReload(t *testing.T) {
	file := filepath.Join(t.TempDir(), "users")
	n := 0
	write := func(text string) {
		t.Helper()
		n++
		if err := os.WriteFile(file+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		os.Chtimes(file+".new", time.Time{}, time.Now().Add(time.Duration(n)*time.Hour)) // whatever the file system's clock can tell apart
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	log := &logs.Log{}
	write("me:" + hash(t, "one"))
	u, err := OpenUsers(file, log.Logger())
	if err != nil {
		t.Fatal(err)
	}
	look := func() {
		u.mu.Lock()
		u.looked = time.Time{} // a second has passed
		u.mu.Unlock()
	}
	if !check(t, u, "me", "one") {
		t.Fatal("refused")
	}
	write("me:" + hash(t, "two"))
	look()
	if check(t, u, "me", "one") || !check(t, u, "me", "two") {
		t.Error("the change is not in force")
	}
	// Who is taken out, in whatever way, does not come in any more; who is left does.
	you := "you:" + hash(t, "three")
	for _, c := range []struct {
		name string
		take func()
		left bool
	}{
		{"one removed, and a wrong line", func() { write("# people\nnonsense\n" + you) }, true},
		{"one locked", func() { write("me:!" + hash(t, "two") + "\n" + you) }, true},
		{"one twice", func() { write(you + "\nme:" + hash(t, "two") + "\nme:" + hash(t, "one")) }, true},
		{"the last removed", func() { write("") }, false},
		{"a comment made of it", func() { write("#me:" + hash(t, "two")) }, false},
		{"nonsense", func() { write("nonsense") }, false},
		{"the file removed", func() { os.Remove(file) }, false},
	} {
		write("me:" + hash(t, "two") + "\n" + you)
		look()
		if !check(t, u, "me", "two") || !check(t, u, "you", "three") {
			t.Errorf("before %s: refused", c.name)
		}
		before := log.Count("can't be used as it is")
		c.take()
		for range 3 {
			look()
			if check(t, u, "me", "two") || check(t, u, "me", "one") || check(t, u, "you", "three") != c.left {
				t.Errorf("%s: the wrong ones come in", c.name)
			}
		}
		if n := log.Count("can't be used as it is") - before; n != 1 {
			t.Errorf("%s: %d complaints", c.name, n)
		}
	}
	// What can't be read at all says nothing of what is in it.
	write("me:" + hash(t, "two"))
	look()
	check(t, u, "me", "two")
	os.Remove(file)
	if err := os.Mkdir(file, 0o700); err != nil {
		t.Fatal(err)
	}
	look()
	if !check(t, u, "me", "two") || log.Count("stay in force") != 1 {
		t.Error("a file that can't be read locks everybody out")
	}
	os.Remove(file)
	write(fmt.Sprintf("you:%s", hash(t, "three")))
	look()
	if check(t, u, "me", "two") || !check(t, u, "you", "three") {
		t.Error("the change after the trouble is not in force")
	}
}

func TestHash(t *testing.T) {
	h, err := Hash("secret")
	if err != nil {
		t.Fatal(err)
	}
	if u, err := NewUsers(map[string]string{"me": h}); err != nil || !check(t, u, "me", "secret") {
		t.Errorf("%q: %v", h, err)
	}
	for _, bad := range []string{"", strings.Repeat("x", 73)} {
		if _, err := Hash(bad); err == nil {
			t.Errorf("%q is hashed", bad)
		}
	}
}

// TestKnown checks that right passwords are remembered for a while, and not more
// of them than there is room for.
//
// +checklocksignore
func TestKnown(t *testing.T) {
	u, err := NewUsers(map[string]string{"me": hash(t, "secret")})
	if err != nil {
		t.Fatal(err)
	}
	key := u.keyOf("me", "secret", u.set.hashes["me"])
	if u.remembers(key) {
		t.Error("before it was checked")
	}
	check(t, u, "me", "secret")
	check(t, u, "me", "wrong")
	if !u.remembers(key) || len(u.known) != 1 {
		t.Error("the right one alone is to be remembered")
	}
	u.known[key] = time.Now().Add(-knownFor)
	if u.remembers(key) {
		t.Error("for ever")
	}
	for i := range 2 * knownMost {
		u.remember(u.keyOf(fmt.Sprint(i), "x", nil))
	}
	if len(u.known) > knownMost {
		t.Errorf("%d are remembered", len(u.known))
	}
}
