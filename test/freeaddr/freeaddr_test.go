package freeaddr

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"testing"
)

// TestMain has this binary say which block it has claimed, too.
func TestMain(m *testing.M) {
	if os.Getenv("CLAIM") == "" {
		os.Exit(m.Run())
	}
	fmt.Print(claim())
}

func TestPorts(t *testing.T) {
	given := map[string]bool{}
	for range block - 10 {
		addr := Get(t)
		if given[addr] {
			t.Fatalf("%s is given twice", addr)
		}
		given[addr] = true
	}
	held := map[int]bool{}
	for range 5 {
		ln, err := net.Listen("tcp", Get(t))
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		held[ln.Addr().(*net.TCPAddr).Port] = true
	}
	for range block {
		for port, n := Ports(t, "127.0.0.1", 3), 0; n < 3; n++ {
			if port+n <= claim() || port+n >= claim()+block || held[port+n] {
				t.Fatalf("%d is given: it is held, or not of the block from %d on", port+n, claim())
			}
		}
	}
}

// TestOthers: two processes have no port in common.
func TestOthers(t *testing.T) {
	own := claim()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "CLAIM=1")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := strconv.Atoi(string(out)); err != nil || got == own || got == 0 {
		t.Errorf("another process has the ports from %q on, and this one from %d", out, own)
	}
}
