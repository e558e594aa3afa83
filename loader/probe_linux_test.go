package loader

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/tailsplice/tailsplice/loader/host"
	"github.com/tailsplice/tailsplice/loader/loadertest"
)

func TestProbe(t *testing.T) {
	if os.Getenv("TS_LDR_PROBE") != "" {
		for _, f := range Probe() {
			t.Logf("%-14s %-8s %s | %s", f.Name, f.State, f.Detail, f.Advice)
			if os.Getuid() != 0 && f.State == host.StateOK && (f.Name == "capabilities" || f.Name == "bpf features") {
				t.Errorf("%s is ok without root", f.Name)
			}
			if os.Getuid() == 0 && f.State == host.StateMissing {
				t.Errorf("%s is missing here: %s", f.Name, f.Detail)
			}
			if f.State != host.StateOK && f.Detail == "" {
				t.Errorf("%s says not what was seen", f.Name)
			}
		}
		return
	}
	exe, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "ts-ldr-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	copied := dir + "/probe.test"
	if err := os.WriteFile(copied, exe, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, uid := range map[string]uint32{"root": 0, "nobody": 65534} {
		t.Run(name, func(t *testing.T) {
			if uid == 0 {
				loadertest.NeedRoot(t)
			}
			cmd := exec.Command(copied, "-test.run=^TestProbe$", "-test.v")
			cmd.Env = append(os.Environ(), "TS_LDR_PROBE=1")
			cmd.Dir = "/"
			if os.Getuid() == 0 {
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
			}
			out, err := cmd.CombinedOutput()
			t.Logf("%s", out)
			if err != nil || !strings.Contains(string(out), "capabilities") {
				t.Error(err)
			}
		})
	}
}
