package handover

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// manager is the end of the service manager, as systemd has it.
type manager struct {
	t *testing.T
	c *net.UnixConn
}

func newManager(t *testing.T) *manager {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return &manager{t, c}
}

// gets returns what has come, a message each: its lines, joined, and "+" for a descriptor, which is returned, too.
func (m *manager) gets() (texts []string, files []*os.File) {
	m.t.Helper()
	for {
		b, oob := make([]byte, 4096), make([]byte, 1024)
		m.c.SetReadDeadline(time.Now().Add(time.Millisecond)) // what was sent is there
		n, oobn, _, _, err := m.c.ReadMsgUnix(b, oob)
		if err != nil {
			return texts, files
		}
		fds, err := receivedFiles(oob[:oobn])
		if err != nil {
			m.t.Fatal(err)
		}
		files = append(files, fds...)
		texts = append(texts, strings.Repeat("+", len(fds))+strings.ReplaceAll(string(b[:n]), "\n", " "))
	}
}

func (m *manager) wants(what string, texts ...string) {
	m.t.Helper()
	got, files := m.gets()
	for _, f := range files {
		f.Close()
	}
	slices.Sort(got)
	slices.Sort(texts)
	if !slices.Equal(got, texts) {
		m.t.Errorf("%s: the manager gets\n%s\nwant\n%s", what, strings.Join(got, "\n"), strings.Join(texts, "\n"))
	}
}

func listening(t *testing.T, network, address string) *os.File {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(t.Context(), network, address)
	if err != nil {
		t.Fatal(err)
	}
	if u, ok := ln.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
	defer ln.Close()
	f, err := ln.(interface{ File() (*os.File, error) }).File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestKeep: the manager is told what has changed, and nothing twice; what is no more is removed, and a later state is
// there before the one before it is removed.
func TestKeep(t *testing.T) {
	m := newManager(t)
	s, wrong := OpenStore()
	if len(wrong) > 0 || s.Len() > 0 || s.State() != nil {
		t.Fatalf("a first start finds %v, %d sockets and %s", wrong, s.Len(), s.State())
	}
	web := Socket{Kind: KindListener, Name: "web: é=&?", Address: ":443", File: listening(t, "tcp", "127.0.0.1:0")}
	tailnet := Socket{Kind: KindListener, Name: strings.Repeat("long", 100), Address: "100.64.0.1:80", Tailnet: true, File: listening(t, "tcp", "127.0.0.1:0")}
	keep := func(state string, all ...Socket) {
		t.Helper()
		if err := s.Keep(all, json.RawMessage(state)); err != nil {
			t.Fatal(err)
		}
	}
	const (
		webName     = "FDNAME=listener?address=%3A443&name=web%3A+%C3%A9%3D%26%3F"
		tailnetName = "FDNAME=listener?address=100.64.0.1%3A80&tailnet=true"
		state       = "FDNAME=state?address="
	)
	keep(`{"a":1}`, web, tailnet)
	m.wants("at first", "+FDSTORE=1 "+webName, "+FDSTORE=1 "+tailnetName, "+FDSTORE=1 "+state+"1")
	keep(`{"a":1}`, web, tailnet)
	m.wants("nothing has changed")
	keep(`{"a":2}`, web)
	m.wants("less", "FDSTOREREMOVE=1 "+tailnetName, "+FDSTORE=1 "+state+"2", "FDSTOREREMOVE=1 "+state+"1")
	web.File = listening(t, "tcp", "127.0.0.1:0")
	keep(`{"a":2}`, web)
	if got, _ := m.gets(); !slices.Equal(got, []string{"FDSTOREREMOVE=1 " + webName, "+FDSTORE=1 " + webName}) {
		t.Errorf("another socket at the same address: %v", got)
	}
	const otherName = "FDNAME=listener?address=%3A443&name=other"
	was := web.Name
	web.Name = "other"
	keep(`{"a":2}`, web)
	if got, _ := m.gets(); !slices.Equal(got, []string{"FDSTOREREMOVE=1 " + webName, "+FDSTORE=1 " + otherName}) {
		t.Errorf("a listener has another name: %v", got)
	}
	web.Name = was
	keep(`{"a":2}`, web)
	m.wants("and the first one again", "FDSTOREREMOVE=1 "+otherName, "+FDSTORE=1 "+webName)
	keep(`{"a":3}`, web)
	got, files := m.gets()
	if !slices.Equal(got, []string{"+FDSTORE=1 " + state + "3", "FDSTOREREMOVE=1 " + state + "2"}) {
		t.Errorf("another state: %v", got)
	}
	b := make([]byte, 100)
	if n, err := files[0].ReadAt(b, 0); string(b[:n]) != `{"a":3}` {
		t.Errorf("the state that is kept is %q (%v)", b[:n], err)
	}

	offered, err := s.Sockets()
	if err != nil || len(offered) != 1 {
		t.Fatalf("a process that takes over gets %v (%v)", offered, err)
	}
	next, _ := OpenStore()
	next.Note(append(offered, web, tailnet, Socket{Kind: KindElder, Address: "7"}))
	Close(offered)
	s = next
	keep(`{"a":3}`, web)
	m.wants("the process that has taken over", "+FDSTORE=1 "+webName, "FDSTOREREMOVE=1 "+tailnetName, "+FDSTORE=1 "+state+"4",
		"FDSTOREREMOVE=1 "+state+"3")
	if err := s.Keep([]Socket{web}, json.RawMessage(`"`+strings.Repeat("x", mostState)+`"`)); err == nil {
		t.Error("a state that no start would read is kept")
	}
	m.wants("a state that is too long")
	if err := s.Keep([]Socket{web}, nil); err != nil {
		t.Fatal(err)
	}
	m.wants("the end", "FDSTOREREMOVE=1 "+state+"4")

	m.c.Close()
	if err := s.Keep([]Socket{tailnet}, nil); err == nil {
		t.Error("a manager that is gone is no error")
	}
}

// TestKeepOffered: a state that is offered to another process stays, since that one could not remove a later one,
// until it is clear that it does not take over.
func TestKeepOffered(t *testing.T) {
	m := newManager(t)
	keep := func(s *Store, state string) {
		t.Helper()
		if err := s.Keep(nil, json.RawMessage(state)); err != nil {
			t.Fatal(err)
		}
	}
	const state = "FDNAME=state?address="
	s, _ := OpenStore()
	if offered, err := s.Sockets(); err != nil || len(offered) != 0 {
		t.Fatalf("without a state, %v is offered (%v)", offered, err)
	}
	keep(s, `{"a":1}`)
	m.wants("none is offered")
	s.Resume()
	keep(s, `{"a":1}`)
	m.wants("that one did not take over", "+FDSTORE=1 "+state+"1")

	offered, err := s.Sockets()
	if err != nil || len(offered) != 1 {
		t.Fatalf("a process that takes over gets %v (%v)", offered, err)
	}
	next, _ := OpenStore()
	next.Note(offered)
	Close(offered)
	keep(s, `{"a":2}`)
	keep(s, `{"a":3}`)
	m.wants("it is offered")
	keep(next, `{"a":4}`)
	m.wants("the process that has taken over", "+FDSTORE=1 "+state+"2", "FDSTOREREMOVE=1 "+state+"1")
}

// passed is a descriptor that the manager has kept, and why it should be refused; "" is not at all.
type passed struct {
	name string
	file *os.File
	why  string
}

// start has another process of this test open the store with what it is passed, and returns what it says.
func start(t *testing.T, all []passed) string {
	t.Helper()
	c := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ exec "$0" -test.run='^TestOpenStore$' -test.v`, os.Args[0])
	var names []string
	for _, p := range all {
		names = append(names, p.name)
		c.ExtraFiles = append(c.ExtraFiles, p.file)
	}
	c.Env = append(os.Environ(), "TEST_STORE=1", fmt.Sprintf("LISTEN_FDS=%d", len(all)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

// inOtherNamespace is a socket of another network namespace, or nil where this process can't make one.
func inOtherNamespace(t *testing.T) (f *os.File) {
	if os.Getuid() != 0 {
		return nil
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and not unlocked: the thread ends
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			f = listening(t, "tcp", ":4")
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	return f
}

// openAndTell is the process that start starts.
func openAndTell(t *testing.T) {
	before := openFiles(t)
	s, wrong := OpenStore()
	for _, err := range wrong {
		fmt.Println("wrong:", err)
	}
	for _, k := range s.Take(func(k Socket) bool { return k.Kind != KindMetrics }) {
		fmt.Printf("taken: %s %q %s %v\n", k.Kind, k.Name, k.Address, k.Tailnet)
		k.File.Close()
	}
	s.Discard()
	fmt.Printf("state: %s\n", s.State())
	for _, name := range os.Environ() {
		if strings.HasPrefix(name, "LISTEN_") {
			t.Errorf("%s is passed on", name)
		}
	}
	var n int
	if fmt.Sscan(os.Getenv("LISTEN_FDS"), &n); openFiles(t).count() > before.count()-n {
		t.Error("descriptors are left open")
	}
}

// TestOpenStore: what an ended process has left is taken where it is what its name says. All else is said and closed,
// and nobody can connect to it any more.
func TestOpenStore(t *testing.T) {
	if os.Getenv("TEST_STORE") != "" {
		openAndTell(t)
		return
	}
	dir := t.TempDir()
	nameFor := func(k Socket) string {
		name, err := nameOf(k)
		if err != nil {
			t.Fatal(err)
		}
		return name
	}
	tcp := func() (*os.File, string) {
		f := listening(t, "tcp4", "127.0.0.1:0")
		ln, err := net.FileListener(f)
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		return f, ln.Addr().String()
	}
	memfd := func(text string) *os.File {
		fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "memfd")
		t.Cleanup(func() { f.Close() })
		f.WriteString(text)
		return f
	}
	good, goodAddr := tcp()
	some := func() *os.File { f, _ := tcp(); return f }
	unnamed, unnamedAddr := tcp()
	multipath := func() (*os.File, string) { // as Go has it
		ln, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		f, err := ln.(*net.TCPListener).File()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f, ln.Addr().String()
	}
	rest, restAddr := multipath()
	otherMultipath, _ := multipath()
	anywhere := listening(t, "tcp", ":0")
	ln, err := net.FileListener(anywhere)
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	ln.Close()
	control, moved := filepath.Join(dir, "control"), filepath.Join(dir, "moved")
	controlFile, movedFile := listening(t, "unix", control), listening(t, "unix", moved)
	movedName := nameFor(Socket{Kind: KindControl, Address: moved})
	if err := os.Remove(moved); err != nil {
		t.Fatal(err)
	}
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	udpFile, err := udp.(*net.UDPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	defer udpFile.Close()
	c, err := net.Dial("tcp", goodAddr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	connected, err := c.(*net.TCPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	defer connected.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	in, out := os.NewFile(uintptr(ends[0]), "in"), os.NewFile(uintptr(ends[1]), "out")
	defer in.Close()
	defer out.Close()
	all := []passed{
		{nameFor(Socket{Kind: KindListener, Name: `odd: "name" é`, Address: goodAddr}), good, ""},
		{nameFor(Socket{Kind: KindListener, Name: "any", Address: ":" + port, Tailnet: true}), anywhere, ""},
		{nameFor(Socket{Kind: KindControl, Address: control}), controlFile, ""},
		{nameFor(Socket{Kind: KindMetrics, Address: restAddr}), rest, ""},
		{"state?address=3", memfd(`{"n":3}`), ""},
		{"state?address=7", memfd(`{"n":7}`), ""},
		{"state?address=5", memfd(`{"n":5}`), ""},
		{"state?address=9", memfd(`{"n":`), "no state that can be read"},
		{"state?address=x", memfd(`{}`), "invalid syntax"},
		{"state?address=11", null, "no memfd"},
		{nameFor(Socket{Kind: KindListener, Name: "second", Address: goodAddr}), some(), "is bound to"},
		{nameFor(Socket{Kind: KindListener, Name: "twice", Address: goodAddr}), good, "another one is for the same"},
		{nameFor(Socket{Kind: KindListener, Address: "127.0.0.1:1"}), some(), "not to 127.0.0.1:1"},
		{nameFor(Socket{Kind: KindListener, Address: "nothing"}), some(), "missing port"},
		{nameFor(Socket{Kind: KindMetrics, Address: "[::1]:80"}), some(), "not to [::1]:80"},
		{nameFor(Socket{Kind: KindListener, Address: udp.LocalAddr().String()}), udpFile, "no socket that listens"},
		{nameFor(Socket{Kind: KindListener, Address: c.LocalAddr().String()}), connected, "no socket that listens"},
		{nameFor(Socket{Kind: KindListener, Address: ":1"}), listening(t, "unix", filepath.Join(dir, "other")), "no TCP socket"},
		{nameFor(Socket{Kind: KindListener, Address: ":2"}), null, "no socket"},
		{nameFor(Socket{Kind: KindListener, Address: ":3"}), otherMultipath, "no TCP socket"},
		{nameFor(Socket{Kind: "flow", Address: "1"}), connected, "knows no such kind"},
		{nameFor(Socket{Kind: KindControl, Address: control}) + "&x=1", some(), "no unix socket"},
		{movedName, movedFile, "its file is gone"},
		{"control?address=%2Fx&inode=-1", movedFile, "invalid syntax"},
		{"flows_in?address=3", in, ""},
		{"flows_out?address=3", out, ""},
		{"flows_out?address=4", some(), "no end of a pair"},
		{"flows_in?address=4", null, "no socket"},
		{"tailsplice.socket", unnamed, "none that this program has stored"},
		{"listener?address=%zz", unnamed, "none that this program has stored"},
		{"stored", null, "none that this program has stored"},
	}
	if f := inOtherNamespace(t); f != nil {
		all = append(all, passed{nameFor(Socket{Kind: KindListener, Address: ":4"}), f, "another network namespace"})
	}
	said := start(t, all)
	for _, p := range all {
		line := fmt.Sprintf("wrong: descriptor %q:", p.name)
		if i := strings.Index(said, line); (i >= 0) != (p.why != "") {
			t.Errorf("%s: refused is %v, want %q", p.name, i >= 0, p.why)
		} else if i >= 0 {
			if text, _, _ := strings.Cut(said[i:], "\n"); !strings.Contains(text, p.why) {
				t.Errorf("it says %s\nwant %q", text, p.why)
			}
		}
	}
	for _, line := range []string{
		fmt.Sprintf("taken: listener %q %s false\n", `odd: "name" é`, goodAddr),
		fmt.Sprintf("taken: listener \"any\" :%s true\n", port),
		fmt.Sprintf("taken: control \"\" %s false\n", control),
		"taken: flows_in \"\" 3 false\n", "taken: flows_out \"\" 3 false\n",
		"state: {\"n\":7}\n",
	} {
		if !strings.Contains(said, line) {
			t.Errorf("it does not say %q", line)
		}
	}
	if t.Failed() {
		t.Log(said)
	}
	for address, want := range map[string]bool{unnamedAddr: true, restAddr: false} {
		c, err := net.Dial("tcp", address)
		if err == nil {
			c.Close()
		}
		if (err == nil) != want {
			t.Errorf("connect to %s: %v, want %v", address, err, want)
		}
	}
}

// FuzzParseName: whatever a descriptor is called, what is taken has a name again, by which it is found.
func FuzzParseName(f *testing.F) {
	f.Add("listener?address=%3A443&name=web&tailnet=true")
	f.Add("control?address=%2Frun%2Fs&inode=12")
	f.Add("state?address=7")
	f.Fuzz(func(t *testing.T, name string) {
		k, err := parseName(name)
		if err != nil || k.Kind == KindControl { // whose name has the number of a file
			return
		}
		again, err := nameOf(k.Socket)
		if err != nil {
			return
		}
		if len(again) > mostName || strings.ContainsFunc(again, func(r rune) bool { return r < ' ' || r > '~' || r == ':' }) {
			t.Fatalf("%q becomes %q", name, again)
		}
		if p, err := parseName(again); err != nil || p.Address != k.Address || p.Kind != k.Kind || p.Tailnet != k.Tailnet {
			t.Fatalf("%q becomes %q, and that %+v (%v)", name, again, p, err)
		}
	})
}

// receivedFiles are the descriptors of a control message.
func receivedFiles(oob []byte) (files []*os.File, err error) {
	fds, err := receivedFDs(oob)
	for _, fd := range fds {
		files = append(files, os.NewFile(uintptr(fd), "handed over"))
	}
	return files, err
}
