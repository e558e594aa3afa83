package spelling

import "testing"

func TestNearest(t *testing.T) {
	for _, c := range []struct{ name, want string }{
		{"blog", "blog"}, {"blgo", "blog"}, {"bolgs", ""}, {"blob", "blog"}, {"b", ""}, {"xyz", ""}, {"edge", ""}, {"shop-ap-1", "shop-api-1"}, {"", ""},
		{"home", "home"}, {"hmoe", "home"}, {"hone", "home"}, {"laptp", "laptop"}, {"la", ""}, {"zzzzzz", ""},
	} {
		if got := Nearest(c.name, []string{"blog", "shop-api-1", "shop-db-1", "home", "laptop"}); got != c.want {
			t.Errorf("%q is nearest to %q, want %q", c.name, got, c.want)
		}
	}
}
