package accesslog

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/logs"
)

var entry = Entry{
	Time: time.Date(2026, 5, 4, 3, 2, 1, 600e6, time.FixedZone("", 2*3600)), ID: "0123", RequestID: "r1", Node: "home", Listener: "web", Client: netip.MustParseAddr("2001:db8::7"),
	User: "me@vsq.cz", Method: "GET", Host: "example.vsq.cz", URI: "/a?b=c", Proto: "HTTP/2.0", Status: 200, BytesUp: 1, BytesDown: 1234, Duration: 1500 * time.Microsecond,
	Referer: "https://vsq.cz/", UserAgent: "curl/8", Route: "default", Target: "tailnet://laptop:8080", Upstream: "100.64.0.4:8080",
}

func TestFormats(t *testing.T) {
	hostile := Entry{Time: entry.Time, Listener: "web", Method: "GET", Host: "a", URI: "/\" \\\x1b[2J\x7f\u009b\n\xff<é", Proto: "HTTP/1.1", Status: 404,
		User: "a b\"", UserAgent: "x\" \"y\r\n", Client: netip.MustParseAddr("192.0.2.1")}
	for _, c := range []struct {
		format func([]byte, *Entry) []byte
		e      *Entry
		want   string
	}{
		{appendCommon, &entry, `2001:db8::7 - me@vsq.cz [04/May/2026:03:02:01 +0200] "GET /a?b=c HTTP/2.0" 200 1234` + "\n"},
		{appendCombined, &entry, `2001:db8::7 - me@vsq.cz [04/May/2026:03:02:01 +0200] "GET /a?b=c HTTP/2.0" 200 1234 "https://vsq.cz/" "curl/8"` + "\n"},
		{appendCombined, &hostile, `192.0.2.1 - a\x20b\" [04/May/2026:03:02:01 +0200] "GET /\"\x20\\\x1b[2J\x7f\xc2\x9b\x0a\xff<\xc3\xa9 HTTP/1.1" 404 - "-" "x\" \"y\x0d\x0a"` + "\n"},
		{appendJSON, &entry, `{"time":"2026-05-04T01:02:01.6Z","format_version":1,"id":"0123","request_id":"r1","node":"home","listener":"web","client":"2001:db8::7","user":"me@vsq.cz","method":"GET",` +
			`"host":"example.vsq.cz","uri":"/a?b=c","proto":"HTTP/2.0","status":200,"bytes_up":1,"bytes_down":1234,"duration":0.0015,"referer":"https://vsq.cz/","user_agent":"curl/8",` +
			`"route":"default","target":"tailnet://laptop:8080","upstream":"100.64.0.4:8080"}` + "\n"},
		{appendJSON, &hostile, `{"time":"2026-05-04T01:02:01.6Z","format_version":1,"listener":"web","client":"192.0.2.1","user":"a b\"","method":"GET","host":"a","uri":"/\" \\\u001b[2J\u007f\u009b\n\ufffd\u003cé",` +
			`"proto":"HTTP/1.1","status":404,"bytes_up":0,"bytes_down":0,"duration":0,"user_agent":"x\" \"y\r\n"}` + "\n"},
	} {
		if got := string(c.format(nil, c.e)); got != c.want {
			t.Errorf("got  %swant %s", got, c.want)
		}
	}
}

// FuzzLine checks that no text ends a line, or gets a control character in.
func FuzzLine(f *testing.F) {
	f.Add("a\"\n\u0085", "\x1b]0;x\a")
	f.Fuzz(func(t *testing.T, a, b string) {
		e := Entry{Time: entry.Time, Method: a, URI: b, Host: a, User: b, Proto: a, Referer: b, UserAgent: a, Err: b}
		for _, format := range []func([]byte, *Entry) []byte{appendJSON, appendCommon, appendCombined} {
			line := format(nil, &e)
			text, ended := strings.CutSuffix(string(line), "\n")
			if !ended || strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r >= 0x7f && r < 0xa0 }) {
				t.Errorf("%q", line)
			}
		}
		if line := appendJSON(nil, &e); !json.Valid(line) {
			t.Errorf("not JSON: %q", line)
		}
	})
}

func open(t *testing.T, file string) (*Log, *logs.Log, *atomic.Int64) {
	t.Helper()
	log, lost := &logs.Log{}, new(atomic.Int64)
	l, err := Open(Options{File: file, Format: "common", Log: log.Logger(), Lost: func(n int) { lost.Add(int64(n)) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l, log, lost
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("never: %s", what)
}

func count(file string) int {
	b, _ := os.ReadFile(file)
	return bytes.Count(b, []byte("\n"))
}

func TestAllLinesArrive(t *testing.T) {
	file := filepath.Join(t.TempDir(), "a.log")
	l, _, lost := open(t, file)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 1000 {
				l.Write(&entry)
			}
		})
	}
	wg.Wait()
	l.Close()
	if n := count(file); n != 8000 || lost.Load() != 0 {
		t.Errorf("%d lines, %d lost", n, lost.Load())
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm()&0o007 != 0 {
		t.Errorf("everybody may read it: %v", st.Mode())
	}
	l.Write(&entry)
	if lost.Load() != 1 {
		t.Error("a line after the end is not counted")
	}
}

// TestRotation renames the file and removes it, with and without being told.
func TestRotation(t *testing.T) {
	for _, how := range []struct {
		name string
		move func(string) error
		tell bool
	}{
		{"renamed, HUP", func(f string) error { return os.Rename(f, f+".1") }, true},
		{"renamed", func(f string) error { return os.Rename(f, f+".1") }, false},
		{"removed", os.Remove, false},
	} {
		t.Run(how.name, func(t *testing.T) {
			t.Parallel() // each waits for a second to pass
			file := filepath.Join(t.TempDir(), "a.log")
			l, log, lost := open(t, file)
			l.Write(&entry)
			eventually(t, "the first line", func() bool { return count(file) == 1 })
			if err := how.move(file); err != nil {
				t.Fatal(err)
			}
			if how.tell {
				l.Reopen()
				eventually(t, "the new file, without a line", func() bool { _, err := os.Stat(file); return err == nil })
			}
			written := 0
			eventually(t, "a line in the new file", func() bool { l.Write(&entry); written++; return count(file) > 0 })
			l.Close()
			if all := count(file) + count(file+".1"); how.name != "removed" && all != written+1 {
				t.Errorf("%d lines of %d", all, written+1)
			}
			if log.Count("lost") > 0 || lost.Load() > 0 {
				t.Error("a rotation is complained of")
			}
		})
	}
}

// TestDiskFull writes to a disk without space, and to one that has some again.
func TestDiskFull(t *testing.T) {
	if _, err := os.Stat("/dev/full"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("this system has no /dev/full")
		}
		t.Skip("this system has no /dev/full")
	}
	file := filepath.Join(t.TempDir(), "a.log")
	if err := os.Symlink("/dev/full", file); err != nil {
		t.Fatal(err)
	}
	l, log, lost := open(t, file)
	for i := range 5 {
		l.Write(&entry)
		eventually(t, "the loss is counted", func() bool { return lost.Load() == int64(i+1) })
	}
	if n := log.Count("requests go on"); n != 1 {
		t.Errorf("%d complaints", n)
	}
	os.Remove(file)
	l.Reopen()
	eventually(t, "lines again", func() bool { l.Write(&entry); return count(file) > 0 })
	eventually(t, "the good news", func() bool { return log.Count("written again") == 1 })
}

// TestNeverBlocks fills the queue of a writer that is stuck.
func TestNeverBlocks(t *testing.T) {
	lost := 0
	l := &Log{opts: Options{Lost: func(n int) { lost += n }}, format: appendCommon, wake: make(chan struct{}, 1)} // nobody writes
	for range 2 * queueBytes / len(appendCommon(nil, &entry)) {
		l.Write(&entry)
	}
	if lost == 0 || len(l.queue) > queueBytes+len(appendCommon(nil, &entry)) {
		t.Errorf("%d lost, %d bytes queued", lost, len(l.queue))
	}
}

func TestOpenErrors(t *testing.T) {
	for _, o := range []Options{{File: filepath.Join(t.TempDir(), "no", "a.log"), Format: "json"}, {File: t.TempDir(), Format: "json"}, {File: Stderr, Format: "xml"}} {
		if _, err := Open(o); err == nil {
			t.Errorf("%+v is opened", o)
		}
	}
}

// TestNamedPipe opens a named pipe that nobody reads, which must not wait for a
// reader, and one whose reader has stopped.
func TestNamedPipe(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(file, 0o600); err != nil {
		t.Fatal(err)
	}
	opened := make(chan error, 1)
	go func() {
		l, err := Open(Options{File: file, Format: "common"})
		if err == nil {
			l.Close()
		}
		opened <- err
	}()
	select {
	case err := <-opened:
		if err == nil || !strings.Contains(err.Error(), "start its reader first") {
			t.Errorf("opened without a reader: %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("opening waits for a reader")
	}
	r, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	l, _, lost := open(t, file)
	for lost.Load() == 0 { // nobody reads
		l.Write(&entry)
	}
}

// shortWriter takes so many bytes, and then has no space.
type shortWriter struct {
	bytes.Buffer
	space int
}

func (w *shortWriter) Write(p []byte) (int, error) {
	n := min(len(p), w.space)
	w.space -= n
	w.Buffer.Write(p[:n])
	if n < len(p) {
		return n, syscall.ENOSPC
	}
	return n, nil
}

// TestTornLine has a disk fill up in the middle of a line: the lines that were
// written are not counted as lost, and the next one is a line of its own.
func TestTornLine(t *testing.T) {
	lost := 0
	out := &shortWriter{space: 6}
	l := &Log{opts: Options{Lost: func(n int) { lost += n }, Log: slog.New(slog.DiscardHandler)}, out: out}
	l.write([]byte("one\ntwo\nthree\n"), 3)
	if lost != 2 {
		t.Errorf("%d lines are lost, want 2", lost)
	}
	l.write([]byte("four\n"), 1)
	out.space = 100
	l.write([]byte("five\n"), 1)
	if got := out.String(); got != "one\ntw\nfive\n" || lost != 3 {
		t.Errorf("%q, %d lost", got, lost)
	}
}

// TestLongTexts checks that no request makes a line without end.
func TestLongTexts(t *testing.T) {
	long := strings.Repeat("x", 1<<20)
	strange := strings.Repeat("\x01", 1<<20)
	for _, e := range []Entry{{URI: long, Host: long, UserAgent: long}, {URI: strange, Host: strange, UserAgent: strange}} {
		for _, format := range []func([]byte, *Entry) []byte{appendJSON, appendCommon, appendCombined} {
			if line := format(nil, &e); len(line) > 3*6*longest+1000 {
				t.Errorf("a line of %d bytes", len(line))
			}
		}
	}
}

// TestFolderComesLate: a log whose folder is not there loses its lines, says so, and is written once the folder is there,
// also where no line comes meanwhile.
func TestFolderComesLate(t *testing.T) {
	file := filepath.Join(t.TempDir(), "late", "a.log")
	log, lost := &logs.Log{}, new(atomic.Int64)
	l, err := Open(Options{File: file, Format: "common", Log: log.Logger(), Lost: func(n int) { lost.Add(int64(n)) }, Wait: true})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.Problem(); !errors.Is(err, os.ErrNotExist) || log.Count("requests go on") != 1 {
		t.Errorf("the problem is %v; %d complaints", err, log.Count("requests go on"))
	}
	l.Write(&entry)
	eventually(t, "the loss is counted", func() bool { return lost.Load() == 1 })
	if err := os.Mkdir(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the file is there", func() bool { _, err := os.Stat(file); return err == nil })
	eventually(t, "the problem is over", func() bool { return l.Problem() == nil && log.Count("written again") == 1 })
	l.Write(&entry)
	eventually(t, "a line", func() bool { return count(file) == 1 })
	if n := log.Count("requests go on"); n != 1 {
		t.Errorf("%d complaints", n)
	}
}
