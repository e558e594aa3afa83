package handover

import (
	"fmt"
	"os"
	"strings"
)

// firstForOOM is the highest oom_score_adj: see proc_pid_oom_score_adj(5).
const firstForOOM = "1000"

// risk has the kernel kill the process, and no other, where memory is short: the old one serves. It is as it
// was before after spare. Where it fails, the kernel chooses by size.
func (s *Successor) risk() {
	was, err := os.ReadFile("/proc/self/oom_score_adj")
	if err == nil {
		err = s.setOOM(firstForOOM)
	}
	if err == nil {
		s.oomBefore = strings.TrimSpace(string(was))
	}
}

// Spare ends that the kernel kills the process first where memory is short: from here on it is worth as much
// as this one.
func (s *Successor) Spare() error {
	if s.oomBefore == "" {
		return nil
	}
	return s.setOOM(s.oomBefore)
}

func (s *Successor) setOOM(score string) error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", s.PID), []byte(score), 0)
}
