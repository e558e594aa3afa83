package host

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
)

// Version is a kernel's, as upstream numbers it.
type Version struct{ Major, Minor, Patch int }

func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Patch) }

func (v Version) Less(w Version) bool {
	return slices.Compare([]int{v.Major, v.Minor, v.Patch}, []int{w.Major, w.Minor, w.Patch}) < 0
}

// least is the oldest kernel on which all tests were seen to pass (make test-kernels). Kernels before 6.0
// read for the verdict as for a process (tcp_read_sock; since 04919bed948d it is tcp_read_skb), and stop at
// an urgent byte: on 5.10.262 the self-test passes, and flows with such a byte stall. 5.15 reads in the same
// way.
var least = Version{Major: 6, Minor: 1}

// good holds, for each stable series, the first release with the fixes for data that was repeated after a
// partial send (3b4f14b79428) and lost on EAGAIN (7683167196bd). Series before 6.4 had the bugs by backports.
var good = map[Version]Version{
	{6, 1, 0}:  {6, 1, 142},
	{6, 6, 0}:  {6, 6, 95},
	{6, 12, 0}: {6, 12, 35},
	{6, 15, 0}: {6, 15, 4},
}

// fixedIn is the first mainline release with those fixes, and with skb_linearize's panic and a use-after-free
// fixed.
var fixedIn = Version{Major: 6, Minor: 16}

// badKernel says why a kernel must not splice, or "".
func badKernel(v Version) string {
	if v.Less(least) {
		return fmt.Sprintf("Linux %v can't run the verdict: it needs %d.%d or newer", v, least.Major, least.Minor)
	}
	if !v.Less(fixedIn) {
		return ""
	}
	floor, ok := good[Version{v.Major, v.Minor, 0}]
	if !ok {
		return fmt.Sprintf("Linux %v repeats or loses spliced data under load, and its series was never fixed; use %v or newer", v, fixedIn)
	}
	if v.Less(floor) {
		return fmt.Sprintf("Linux %v repeats or loses spliced data under load; use %v, or %d.%d or newer", v, floor, fixedIn.Major, fixedIn.Minor)
	}
	return ""
}

var (
	plainRelease = regexp.MustCompile(`^(\d+)\.(\d+)(?:\.(\d+))?`)
	// Debian's release is 6.1.0-18-amd64, and its version "#1 SMP PREEMPT_DYNAMIC Debian 6.1.76-1
	// (2024-02-01)".
	debianVersion = regexp.MustCompile(`Debian (\d+)\.(\d+)\.(\d+)`)
	// Ubuntu's /proc/version_signature is "Ubuntu 5.15.0-91.101-generic 5.15.131".
	ubuntuSignature = regexp.MustCompile(`^Ubuntu \S+ (\d+)\.(\d+)\.(\d+)`)
)

// parseVersion finds the upstream version behind what a distribution calls its kernel: uname's release and
// version, and Ubuntu's /proc/version_signature where there is one.
func parseVersion(release, build, signature string) (Version, bool) {
	for _, try := range []struct {
		re *regexp.Regexp
		in string
	}{{ubuntuSignature, signature}, {debianVersion, build}, {plainRelease, release}} {
		if m := try.re.FindStringSubmatch(try.in); m != nil {
			var n [3]int
			for i, s := range m[1:] {
				n[i], _ = strconv.Atoi(s) // an absent patch is 0
			}
			return Version{n[0], n[1], n[2]}, true
		}
	}
	return Version{}, false
}

// ErrKnownBad is what New fails with on a kernel that is known to damage spliced streams.
var ErrKnownBad = errors.New("this kernel is known to damage spliced streams")
