// Package route looks names up in an immutable table of patterns: exact names before wildcards, longer
// wildcards before shorter ones, and the default last.
//
// The time of a lookup depends on the number of labels in the name, not on the number of patterns: it is one
// map access for the name, and one for each of its parents that could be a wildcard's. A table never
// changes after Build, so any number of goroutines may use it without a lock; to change routes, build another
// one and swap the pointer.
package route

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"strings"
)

// maxName is the longest DNS name in presentation form, without a dot at its end (RFC 1035 2.3.4).
const maxName = 253

// Builder collects patterns. The zero Builder is ready to use. It is not safe for concurrent use.
type Builder[T any] struct {
	exact, wild map[string][]T
	defaults    []T
}

// Add adds a value for a pattern: a name such as example.org, or *.example.org, which matches one label or
// more in place of the star, so a.example.org and a.b.example.org but not example.org. A pattern may be
// added several times: Lookup tries its values in the order of adding.
//
// Patterns are compared without case, and without a dot at the end. International names are given as their
// A-labels.
func (b *Builder[T]) Add(pattern string, v T) error {
	name := strings.ToLower(strings.TrimSuffix(pattern, "."))
	suffix, wild := strings.CutPrefix(name, "*.")
	if err := check(suffix); err != nil {
		return fmt.Errorf("add route %q: %w", pattern, err)
	}
	if len(name) > maxName {
		return fmt.Errorf("add route %q: the name is longer than %d bytes", pattern, maxName)
	}
	if b.exact == nil {
		b.exact, b.wild = map[string][]T{}, map[string][]T{}
	}
	if wild {
		b.wild[suffix] = append(b.wild[suffix], v)
	} else {
		b.exact[name] = append(b.exact[name], v)
	}
	return nil
}

// check refuses what no name could ever match.
func check(name string) error {
	for i := range len(name) {
		switch c := name[i]; {
		case c >= 0x80:
			return errors.New("give an international name as its A-labels")
		case c == '*':
			return errors.New("a wildcard is the whole first label, as in *.example.org; for every name use the default")
		case c <= ' ' || c == 0x7f:
			return errors.New("there is a space or control character in the name")
		case c == '.' && (i == 0 || name[i-1] == '.' || i == len(name)-1):
			return errors.New("a label between dots is empty")
		}
	}
	if name == "" {
		return errors.New("the name is empty")
	}
	return nil
}

// Default adds a value for every name that no pattern takes, and for no name at all. Several are tried in
// the order of adding.
func (b *Builder[T]) Default(v T) {
	b.defaults = append(b.defaults, v)
}

// Build returns a table of what was added so far. The builder may be used further; the table stays as it is.
func (b *Builder[T]) Build() *Table[T] {
	t := &Table[T]{
		exact: make(map[string]span, len(b.exact)),
		wild:  make(map[string]span, len(b.wild)),
	}
	place := func(values []T) span {
		s := span{first: uint32(len(t.values)), n: uint32(len(values))}
		t.values = append(t.values, values...)
		if len(t.values) > math.MaxUint32 {
			panic("route: more than 2^32 routes")
		}
		return s
	}
	for name, values := range maps.All(b.exact) {
		t.exact[name] = place(values)
	}
	for suffix, values := range maps.All(b.wild) {
		t.wild[suffix] = place(values)
		t.longest = max(t.longest, len(suffix))
	}
	t.defaults = place(b.defaults)
	return t
}

// Table is an immutable set of patterns and their values. The zero Table, and a nil one, hold nothing.
type Table[T any] struct {
	exact    map[string]span // by name
	wild     map[string]span // by what stands behind "*."
	longest  int             // bytes of the longest key of wild
	values   []T
	defaults span
}

// span is a run of values. One slice for all of them spares 100,000 small ones.
type span struct{ first, n uint32 }

// Len returns how many values the table holds, those of the default included.
func (t *Table[T]) Len() int {
	if t == nil {
		return 0
	}
	return len(t.values)
}

// Lookup returns the first value that accept takes (nil takes any): of the exact name, then of each wildcard
// that matches it from the longest to the shortest, then of the default. It does not allocate, if accept does
// not. The name may have upper case and a dot at the end; an empty one, or one longer than a DNS name can be,
// only gets the default.
func (t *Table[T]) Lookup(name string, accept func(T) bool) (v T, ok bool) {
	if t == nil {
		return v, false
	}
	if n := len(name); n > 0 && name[n-1] == '.' {
		name = name[:n-1]
	}
	if name != "" && len(name) <= maxName {
		// Map accesses by string(bytes) do not allocate.
		var buf [maxName]byte
		b := buf[:copy(buf[:], name)]
		for i, c := range b {
			if 'A' <= c && c <= 'Z' {
				b[i] = c + 'a' - 'A'
			}
		}
		if s, found := t.exact[string(b)]; found {
			if v, ok = t.first(s, accept); ok {
				return v, true
			}
		}
		// A dot at the front would leave no label for the star.
		for i := 1; i < len(b) && t.longest > 0; i++ {
			if b[i] != '.' || len(b)-i-1 > t.longest {
				continue
			}
			if s, found := t.wild[string(b[i+1:])]; found {
				if v, ok = t.first(s, accept); ok {
					return v, true
				}
			}
		}
	}
	return t.first(t.defaults, accept)
}

func (t *Table[T]) first(s span, accept func(T) bool) (v T, ok bool) {
	for _, v := range t.values[s.first : s.first+s.n] {
		if accept == nil || accept(v) {
			return v, true
		}
	}
	return v, false
}
