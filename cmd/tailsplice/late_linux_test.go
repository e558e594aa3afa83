package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/tailsplice/tailsplice/loader/loadertest"
	"github.com/tailsplice/tailsplice/test/freeaddr"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/server"
)

// TestSockmapComesLate: while TCP is short of memory nobody can prove how this kernel splices. The daemon
// starts all the same, says so, has flows go through userspace, and has the datapath once there is memory.
// Doctor blames no kernel.
func TestSockmapComesLate(t *testing.T) {
	needRoot(t)
	loadertest.HoldMemory(t)
	for _, word := range []string{"sockmap", "auto"} {
		t.Run(word, func(t *testing.T) {
			dir, err := os.MkdirTemp("", "ts-cli-")
			check(t, err)
			defer os.RemoveAll(dir)
			at, target := freeaddr.Get(t), listen(t, "127.0.0.1:0")
			control, file, limits := filepath.Join(dir, "control.sock"), filepath.Join(dir, "edge.yaml"), filepath.Join(dir, "tcp_mem")
			check(t, os.WriteFile(file, fmt.Appendf(nil, "listeners: [{ name: web, listen: [%q], mode: sni, default: { forward: %q, datapath: %s } }]\ncontrol: { socket: %q }\n",
				at, target.Addr(), word, control), 0o600))
			check(t, os.WriteFile(limits, []byte("1 2 3\n"), 0o600))
			// What the programs read is short; what the kernel goes by is not.
			short := func(arg ...string) *exec.Cmd {
				c := exec.Command("unshare", append([]string{"--mount", "--propagation", "private", "sh", "-c",
					`mount --bind "$0" /proc/sys/net/ipv4/tcp_mem && exec tailsplice "$@"`, limits}, arg...)...)
				c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
				return c
			}
			out, err := short("doctor", "--control", control).Output()
			check(t, err)
			if s := string(out); !strings.Contains(s, "degraded  redirect") || !strings.Contains(s, "TCP is short of memory") || strings.Contains(s, "use another kernel") {
				t.Errorf("doctor:\n%s", s)
			}

			var log strings.Builder
			daemon := short("run", "--config", file)
			daemon.Stderr = &log
			check(t, daemon.Start())
			defer func() {
				_ = daemon.Process.Signal(syscall.SIGINT)
				if err := daemon.Wait(); err != nil {
					t.Errorf("%v\n%s", err, log.String())
				}
			}()
			read := func(v any, noun string) error {
				out, err := exec.Command("tailsplice", noun, "--json", "--control", control).Output()
				if err != nil {
					return err
				}
				return json.Unmarshal(out, v)
			}
			// datapath is what status has of sockmap.
			datapath := func() (d server.DatapathStatus, problems []server.Problem, err error) {
				var s server.Status
				err = read(&s, "status")
				for _, d := range s.Datapaths {
					if d.Name == "sockmap" {
						return d, s.Problems, err
					}
				}
				return d, s.Problems, fmt.Errorf("status has no sockmap: %+v, %w", s.Datapaths, err)
			}
			wait(t, "status says why there is no sockmap", func() error {
				d, problems, err := datapath()
				if err != nil {
					return err
				}
				if d.Available || d.SwitchedOff || !strings.Contains(d.Reason, "TCP is short of memory") || strings.Contains(d.Reason, "does not splice rightly") {
					return fmt.Errorf("%+v", d)
				}
				if word == "sockmap" && (len(problems) != 1 || problems[0].Part != server.PartDatapath || problems[0].Unready()) {
					return fmt.Errorf("problems %+v", problems)
				}
				return nil
			})
			with := func() (string, error) {
				client, upstream, _ := connect(t, at, target)
				defer client.Close()
				defer upstream.Close()
				var all []flow.Snapshot
				if err := read(&all, "flows"); err != nil || len(all) != 1 {
					return "", fmt.Errorf("%d flows, %v", len(all), err)
				}
				return all[0].Datapath, nil
			}
			wait(t, "a flow goes through userspace", func() error {
				if d, err := with(); err != nil || d != "userspace" {
					return fmt.Errorf("%q, %v", d, err)
				}
				return nil
			})

			check(t, os.WriteFile(limits, []byte("100000000 200000000 300000000\n"), 0o600))
			wait(t, "there is memory, and sockmap", func() error {
				d, problems, err := datapath()
				if err != nil || !d.Available || len(problems) > 0 {
					return fmt.Errorf("%+v, %+v, %v", d, problems, err)
				}
				return nil
			})
			if word == "auto" {
				return // gives it flows that are ping-pong
			}
			wait(t, "a flow has it", func() error {
				if d, err := with(); err != nil || d != "sockmap" {
					return fmt.Errorf("%q, %v", d, err)
				}
				return nil
			})
		})
	}
}
