package host

import (
	"strings"
	"testing"
)

func TestParseVersion(t *testing.T) {
	for _, c := range []struct{ release, build, signature, want string }{
		{"6.18.44-fc-v669", "#1 SMP PREEMPT_DYNAMIC @0", "", "6.18.44"},
		{"6.1.0-18-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.76-1 (2024-02-01)", "", "6.1.76"},
		{"5.15.0-91-generic", "#101-Ubuntu SMP", "Ubuntu 5.15.0-91.101-generic 5.15.131", "5.15.131"},
		{"7.0-rc3", "#1", "", "7.0.0"},
		{"6.12.35+deb13-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.12.35-1", "", "6.12.35"},
	} {
		if v, ok := parseVersion(c.release, c.build, c.signature); !ok || v.String() != c.want {
			t.Errorf("%q: %v, %v", c.release, v, ok)
		}
	}
	if v, ok := parseVersion("unknown", "", ""); ok {
		t.Errorf("a version in nothing: %v", v)
	}
}

func TestBadKernel(t *testing.T) {
	for _, c := range []struct {
		v   Version
		bad string // a part of the reason
	}{
		{Version{4, 19, 300}, "can't run"},
		{Version{5, 4, 300}, "can't run"},
		{Version{5, 10, 262}, "can't run"},
		{Version{5, 15, 186}, "can't run"},
		{Version{6, 0, 19}, "can't run"},
		{Version{6, 1, 141}, "use 6.1.142"},
		{Version{6, 1, 142}, ""},
		{Version{6, 4, 0}, "never fixed"},
		{Version{6, 12, 34}, "use 6.12.35"},
		{Version{6, 12, 35}, ""},
		{Version{6, 14, 99}, "never fixed"},
		{Version{6, 15, 4}, ""},
		{Version{6, 16, 0}, ""},
		{Version{6, 18, 44}, ""},
		{Version{7, 0, 0}, ""},
	} {
		why := badKernel(c.v)
		if (why == "") != (c.bad == "") || !strings.Contains(why, c.bad) {
			t.Errorf("%v: %q, want %q", c.v, why, c.bad)
		}
	}
}
