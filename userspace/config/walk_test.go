package config

import (
	"fmt"
	"testing"
)

// TestActions: each action is given once, in the order of the file, and a walk may end early.
func TestActions(t *testing.T) {
	c, err := Parse("test.yaml", []byte(`
node: here
listeners:
  - { name: a, listen: ":1", mode: sni, routes: [{ sni: a.test, reject: true }, { sni: b.test, forward: "192.0.2.1:1" }], default: { forward: "192.0.2.2:1" } }
  - { name: b, listen: ":2", mode: sni, routes: [{ sni: c.test, forward: "192.0.2.3:1" }] }
`))
	if err != nil {
		t.Fatal(err)
	}
	const all = "a:, a:192.0.2.1, a:192.0.2.2, b:192.0.2.3, "
	for most := 1; most <= 4; most++ {
		got, n := "", 0
		for l, a := range c.Actions() {
			got += fmt.Sprintf("%s:%s, ", l.Name, a.Target().Host)
			if n++; n == most {
				break
			}
		}
		if want := all[:len(got)]; got != want || n != most {
			t.Errorf("the first %d: %q, want %q", most, got, want)
		}
	}
}
