package lab_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// childEnv has TestMain be the owner of a world that the parent ends in some bad way.
const childEnv = "TAILSPLICE_LAB_CHILD"

func TestMain(m *testing.M) {
	if how := os.Getenv(childEnv); how != "" {
		child(how)
	}
	os.Exit(m.Run())
}

func child(how string) {
	w, err := lab.New(context.Background(), lab.Options{NoAnycast: how != "kill", NoDocker: how != "kill",
		NoTailnet: how != "kill", Friend: true})
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	if _, err := w.EdgeA.StartProcess("sleep", []string{"sleep", "1000"}, nil); err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	fmt.Println("up", filepath.Base(w.Dir))
	switch how {
	case "panic":
		go panic("somewhere else")
	case "exit":
		os.Exit(3)
	}
	select {}
}

// TestLeavesNothing: however the owner of a world dies, its processes, namespaces, cgroups and files go with
// it.
func TestLeavesNothing(t *testing.T) {
	lab.Require(t, lab.Options{})
	for _, how := range []string{"kill", "interrupt", "panic", "exit"} {
		t.Run(how, func(t *testing.T) {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), childEnv+"="+how)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer cmd.Wait()
			defer cmd.Process.Kill()
			line, _ := bufio.NewReader(out).ReadString('\n')
			id, ok := strings.CutPrefix(strings.TrimSpace(line), "up ")
			if !ok {
				t.Fatalf("the child says %q", line)
			}
			switch how {
			case "kill":
				if left := leftovers(t, id); len(left) < 12 { // the check must be able to find something
					t.Errorf("while the world is up, there is only %v", left)
				}
				cmd.Process.Kill()
			case "interrupt":
				cmd.Process.Signal(syscall.SIGINT)
			}
			deadline := time.Now().Add(time.Minute)
			for left := leftovers(t, id); len(left) > 0; left = leftovers(t, id) {
				if time.Now().After(deadline) {
					t.Fatalf("left behind: %v", left)
				}
				time.Sleep(50 * time.Millisecond)
			}
		})
	}
}

// leftovers finds what carries the run's id: names, files, and processes by their arguments or environment.
func leftovers(t *testing.T, id string) []string {
	t.Helper()
	var left []string
	for _, pattern := range []string{
		"/run/netns/" + id + "-*", "/run/tailsplice-lab/" + id + "*", filepath.Join(os.TempDir(), id),
		"/sys/fs/cgroup/tailsplice-lab/" + id, "/sys/fs/cgroup/*/tailsplice-lab/" + id,
	} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		left = append(left, found...)
	}
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		args, _ := os.ReadFile(p + "/cmdline")
		env, _ := os.ReadFile(p + "/environ")
		if strings.Contains(string(args)+string(env), id) {
			left = append(left, strings.ReplaceAll(filepath.Base(p)+" "+string(args), "\x00", " "))
		}
	}
	return left
}
