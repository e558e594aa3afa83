package loader

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/tailsplice/tailsplice/loader/host"
	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/test/cgroup"
)

func TestLocalSelfTest(t *testing.T) {
	loadertest.NeedRoot(t)
	l, err := New(Options{Instance: fmt.Sprintf("ts-ldr-%d-%d", os.Getpid(), instances.Add(1)), MaxFlows: 64,
		Local: true})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	n, err := l.Local()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range n.SelfTest() {
		t.Log(f.Name, f.State, f.Detail, f.Took)
		if f.State != host.StateOK {
			t.Error(f)
		}
	}
	if hasFlows(t, l) {
		t.Error("flows are left")
	}
}

// The program is attached to the cgroup of the target, and nowhere else; and a daemon that is killed leaves
// nothing there.
func TestLocalAttachment(t *testing.T) {
	loadertest.NeedRoot(t)
	instance := fmt.Sprintf("ts-ldr-local-%d", os.Getpid())
	if i := os.Getenv("TS_LDR_LOCAL"); i != "" {
		l, err := load(Options{Instance: i, MaxFlows: 16, Local: true}, nil)
		loadertest.Must(t, err)
		n, err := l.Local()
		loadertest.Must(t, err)
		ln, err := net.FileListener(os.NewFile(3, "listener"))
		loadertest.Must(t, err)
		loadertest.BecomeLocal(t, n, ln)
		fmt.Println("ready")
		select {}
	}
	pins := filepath.Join("/sys/fs/bpf", "tailsplice", instance)
	t.Cleanup(func() { os.RemoveAll(pins) })
	ln, dir := cgroup.Listen(t, "tcp4")
	file, err := ln.(*net.TCPListener).File()
	loadertest.Must(t, err)
	defer file.Close()
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestLocalAttachment$")
	cmd.Env, cmd.ExtraFiles = append(os.Environ(), "TS_LDR_LOCAL="+instance), []*os.File{file}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	loadertest.Must(t, err)
	loadertest.Must(t, cmd.Start())
	b := make([]byte, 5)
	if _, err := io.ReadFull(out, b); err != nil || string(b) != "ready" {
		t.Fatalf("%q %v", b, err)
	}
	if n := loadertest.Attached(t, dir); n != 1 {
		t.Errorf("%d programs are attached to the target's cgroup", n)
	}
	if n := loadertest.Attached(t, filepath.Dir(dir)); n != 0 {
		t.Errorf("%d programs are attached to the root of all cgroups", n)
	}
	loadertest.Must(t, cmd.Process.Kill())
	cmd.Wait()
	loadertest.WaitFor(t, func() bool { return loadertest.Attached(t, dir) == 0 }, "the dead daemon's program to go")

	l, err := load(Options{Instance: instance, MaxFlows: 16, Local: true}, nil)
	loadertest.Must(t, err)
	n, err := l.Local()
	loadertest.Must(t, err)
	p := loadertest.BecomeLocal(t, n, ln)
	loadertest.Must(t, loadertest.BothWays(p, 1<<20))
	loadertest.Must(t, l.Close())
	if n := loadertest.Attached(t, dir); n != 0 {
		t.Errorf("%d programs are attached after the end", n)
	}
	if _, err := os.Stat(pins); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("pins are left: %v", err)
	}
}
