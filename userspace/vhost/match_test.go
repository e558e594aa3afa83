package vhost

import "testing"

// TestAnyCase: the path of a guard is matched in whatever case servers take for the same, and costs no
// memory.
func TestAnyCase(t *testing.T) {
	for _, c := range []struct {
		route, path string
		takes       bool
	}{
		{"/admin", "/admin", true}, {"/admin", "/Admin", true}, {"/admin/", "/ADMIN", true}, {"/Admin", "/admin/x", true},
		{"/key", "/\u212aey", true}, {"/sub", "/\u017fub/x", true}, {"/list", "/l\u0131st", true}, {"/\xc3\xa9", "/\xc3\x89", true},
		{"", "/x", true}, {"/", "/", true},
		{"/admin", "/admins", false}, {"/admin", "/adm", false}, {"/admin", "/", false}, {"/admin", "", false},
		{"/admin", "/x/Admin", false}, {"/key", "/\u212a", false},
	} {
		m := Match{Path: c.route, AnyCase: true}
		if got := m.TakesPath(c.path); got != c.takes {
			t.Errorf("%q takes %q: %v", c.route, c.path, got)
		}
	}
	m := Match{Path: "/admin", AnyCase: true}
	if n := testing.AllocsPerRun(100, func() { m.TakesPath("/ADMINS/x") }); n > 0 {
		t.Errorf("%v allocations", n)
	}
	if m.AnyCase = false; m.TakesPath("/Admin") {
		t.Error("a route without a guard takes another case")
	}
}
