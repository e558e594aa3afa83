package loader

import (
	"errors"
	"testing"
)

func TestSelfTest(t *testing.T) {
	l := open(t, allRules, 16)
	for _, f := range l.selfTest() {
		t.Logf("%-10s %-8s %v %s", f.Name, f.State, f.Took, f.Detail)
		if f.State != StateOK {
			t.Errorf("%s: %s: %s", f.Name, f.State, f.Detail)
		}
	}
	if n := l.Stats().Flows; n != 0 {
		t.Errorf("%d flows are left", n)
	}
}

// Each rule that the self-test is there for makes it fail when it is off.
func TestSelfTestFindsBrokenRules(t *testing.T) {
	for name, c := range map[string]struct {
		off   func(*rules)
		tests []string
	}{
		"bound": {func(r *rules) { r.bound = false }, []string{"bound"}},
		"trim":  {func(r *rules) { r.trim = false }, []string{"trim", "overlap"}},
		"kick":  {func(r *rules) { r.kick, r.look = false, false }, []string{"kick"}},
		"reset": {func(r *rules) { r.reset = false }, []string{"reset"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := allRules
			c.off(&r)
			l := open(t, r, 16)
			found := map[string]Finding{}
			all := l.selfTest()
			for _, f := range all {
				found[f.Name] = f
			}
			for _, test := range c.tests {
				if f := found[test]; f.State != StateMissing {
					t.Errorf("%s did not fail: %+v", test, f)
				} else {
					t.Logf("%s: %s", test, f.Detail)
				}
			}
			var e *SelfTestError
			if err := failed(all); !errors.As(err, &e) {
				t.Errorf("no error: %v", err)
			}
		})
	}
}
