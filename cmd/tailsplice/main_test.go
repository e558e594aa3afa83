package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/tailsplice/tailsplice/test/freeaddr"
)

// fakes are programs that tests of some systems start.
var fakes map[string]func()

func TestMain(m *testing.M) {
	programs := map[string]func(){"tailsplice": main}
	maps.Copy(programs, fakes)
	testscript.Main(m, programs)
}

// haveRoot says whether what needs root can be tested; under CI all is.
func haveRoot() (bool, error) {
	if os.Getuid() == 0 {
		return true, nil
	}
	if os.Getenv("CI") != "" {
		return false, errors.New("needs root")
	}
	return false, nil
}

// needRoot skips a test of people who are not root. CI is.
func needRoot(t *testing.T) {
	t.Helper()
	if root, err := haveRoot(); err != nil {
		t.Fatal(err)
	} else if !root {
		t.Skip("needs root")
	}
}

// TestScripts runs the command line as people do. Commands of our own:
//
//	freeport NAME...    sets each variable to a free TCP port of 127.0.0.1
//	waitfor FILE        waits until the file (or socket) is there
//	get URL             prints the status and the body of what the URL answers, once something listens there
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(e *testscript.Env) error {
			// A unix socket's path has at most 107 bytes, and the work folder is deep.
			run, err := os.MkdirTemp("", "ts-cli-")
			if err != nil {
				return err
			}
			e.Defer(func() { os.RemoveAll(run) })
			e.Setenv("RUN", run)
			e.Setenv("GORACE", os.Getenv("GORACE")) // a script's environment has nothing of ours
			e.Setenv("TAILSPLICE_TAILSCALED_SOCKET", filepath.Join(run, "no-tailscaled.sock"))
			e.Setenv("DOCKER_HOST", "unix://"+filepath.Join(run, "no-dockerd.sock"))
			return os.WriteFile(filepath.Join(e.WorkDir, "installed.yaml"), []byte(installed), 0o644)
		},
		Condition: func(cond string) (bool, error) {
			switch cond {
			case "root":
				return haveRoot()
			case "promtool":
				_, err := exec.LookPath(cond)
				if err != nil && os.Getenv("CI") != "" {
					return false, err
				}
				return err == nil, nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"freeport": func(ts *testscript.TestScript, neg bool, args []string) {
				for _, name := range args {
					ts.Setenv(name, strconv.Itoa(freeaddr.Ports(ts, "127.0.0.1", 1)))
				}
			},
			"get": func(ts *testscript.TestScript, neg bool, args []string) {
				res, err := http.Get(args[0])
				for end := time.Now().Add(time.Minute); errors.Is(err, syscall.ECONNREFUSED) && time.Now().Before(end); {
					time.Sleep(20 * time.Millisecond) // the control socket is there before the rest
					res, err = http.Get(args[0])
				}
				ts.Check(err)
				defer res.Body.Close()
				body, err := io.ReadAll(res.Body)
				ts.Check(err)
				fmt.Fprintf(ts.Stdout(), "%d %s", res.StatusCode, body)
			},
			"waitfor": func(ts *testscript.TestScript, neg bool, args []string) {
				for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
					if _, err := os.Stat(args[0]); err == nil {
						return
					}
				}
				ts.Fatalf("%s did not appear within a minute", args[0])
			},
		},
	})
}
