package topology

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"
)

func need(t *testing.T) {
	t.Helper()
	if lacks := Lacks(); lacks != "" {
		if os.Getenv("CI") == "true" {
			t.Fatal("this machine lacks " + lacks)
		}
		t.Skip("this machine lacks " + lacks)
	}
}

// reach has the client call a port of the address that nobody listens on: to be refused is an answer.
func reach(top *Topology, addr string) error {
	return top.Client.(*namespace).do(func() error {
		c, err := net.DialTimeout("tcp", net.JoinHostPort(addr, "9"), time.Second)
		if err == nil {
			c.Close()
		}
		if errors.Is(err, syscall.ECONNREFUSED) {
			return nil
		}
		return err
	})
}

// What a run makes is gone after it, and hosts reach each other as the measures expect.
func TestVeth(t *testing.T) {
	need(t)
	r, err := NewRun()
	if err != nil {
		t.Fatal(err)
	}
	top, err := NewVeth()
	if err != nil {
		r.Close()
		t.Fatal(err)
	}
	for name, to := range map[string]string{"server through the proxy": top.Direct.Addr().String(), "proxy": top.Listen.String(),
		"server by the far path": top.FarDirect.Addr().String(), "proxy by the far path": top.Far.String()} {
		if err := reach(top, to); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := top.SetLoss(1); err != nil {
		t.Error(err)
	}
	if reach(top, top.Listen.String()) == nil {
		t.Error("with all packets lost the proxy still answers")
	}
	if err := top.SetLoss(0); err != nil {
		t.Error(err)
	}
	if err := reach(top, top.Listen.String()); err != nil {
		t.Errorf("after the loss: %v", err)
	}
	top.Close()
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	left, _ := filepath.Glob("/run/netns/" + filepath.Base(r.Dir) + "*")
	if _, err := os.Stat(r.Dir); err == nil || len(left) > 0 {
		t.Errorf("left: %v, %s (%v)", left, r.Dir, err)
	}
}

// A run that was killed together with its reaper is swept by the next one.
func TestSweep(t *testing.T) {
	need(t)
	dead := exec.Command("true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	name := prefix + strconv.Itoa(dead.Process.Pid) + "-client"
	if err := command("ip", "netns", "add", name); err != nil {
		t.Fatal(err)
	}
	r, err := NewRun()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := os.Stat("/run/netns/" + name); err == nil {
		command("ip", "netns", "del", name)
		t.Error("the dead run's namespace is still there")
	}
}
