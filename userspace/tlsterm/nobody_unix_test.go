//go:build unix

package tlsterm

import (
	"os/exec"
	"syscall"
	"testing"
)

// asNobody makes cmd run without root's rights.
func asNobody(_ *testing.T, cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
}
