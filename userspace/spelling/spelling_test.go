package spelling

import "testing"

func TestNearest(t *testing.T) {
	for _, c := range []struct{ name, want string }{
		{"blog", "blog"}, {"blgo", "blog"}, {"bolgs", "blog"}, {"blob", "blog"}, {"b", ""}, {"xyz", ""}, {"edge", ""}, {"shop-ap-1", "shop-api-1"}, {"", ""},
		{"home", "home"}, {"hmoe", "home"}, {"hone", "home"}, {"laptp", "laptop"}, {"la", ""}, {"zzzzzz", ""},
	} {
		if got := Nearest(c.name, []string{"blog", "shop-api-1", "shop-db-1", "home", "laptop"}); got != c.want {
			t.Errorf("%q is nearest to %q, want %q", c.name, got, c.want)
		}
	}
}

func TestDistance(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int
	}{
		{"", "", 0}, {"a", "", 1}, {"", "ab", 2}, {"listen", "listen", 0}, {"listn", "listen", 1}, {"lisetn", "listen", 1},
		{"forwrad", "forward", 1}, {"snl", "sni", 1}, {"ca", "abc", 3}, {"kitten", "sitting", 3}, {"é", "e", 1},
	} {
		if got := Distance(c.a, c.b); got != c.want {
			t.Errorf("Distance(%q, %q) = %d, want %d", c.a, c.b, got, c.want)
		}
		if got := Distance(c.b, c.a); got != c.want {
			t.Errorf("Distance(%q, %q) = %d, want %d", c.b, c.a, got, c.want)
		}
	}
}
