package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/freeaddr"
)

// TestSecondSignal: INT drains, TERM after it cuts no flow, and TERM once more does.
func TestSecondSignal(t *testing.T) {
	target := listen(t, "127.0.0.1:0")
	go func() {
		for c, err := target.Accept(); err == nil; c, err = target.Accept() {
			go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
		}
	}()
	address := freeaddr.Get(t)
	d := startStalled(t, fmt.Sprintf(
		"listeners: [{ listen: [%q], mode: tcp, default: { forward: %q } }]", address, target.Addr().String()))
	c, err := net.Dial("tcp", address)
	check(t, err)
	defer c.Close()
	check(t, c.SetDeadline(time.Now().Add(time.Minute)))
	echo := func() error {
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		_, err := io.ReadFull(c, make([]byte, 1))
		return err
	}
	check(t, echo())
	log := bufio.NewReader(d.log)
	check(t, d.log.SetReadDeadline(time.Now().Add(time.Minute)))
	says := func(text string) {
		t.Helper()
		for {
			line, err := log.ReadString('\n')
			if err != nil {
				t.Fatalf("the log does not say %q: %v", text, err)
			}
			if strings.Contains(line, text) {
				return
			}
		}
	}
	check(t, d.cmd.Process.Signal(syscall.SIGINT))
	says(`"draining`)
	check(t, d.cmd.Process.Signal(syscall.SIGTERM))
	says(`"still draining`)
	if err := echo(); err != nil {
		t.Errorf("a signal of another kind has cut the flow: %v", err)
	}
	check(t, d.cmd.Process.Signal(syscall.SIGTERM))
	says(`"ended"`)
	if err := echo(); err == nil {
		t.Error("the same signal again has not cut the flow")
	}
	check(t, d.cmd.Wait())
}
