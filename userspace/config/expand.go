package config

import (
	"regexp"
	"strings"
	"unicode/utf8"
)

// variable finds ${NAME}, ${NAME:-DEFAULT}, what was meant to be one, and $${, which stands for ${ itself.
var variable = regexp.MustCompile(`\$\$\{|\$\{([^}]*)(\}?)`)

// variableName is what a shell takes for one (POSIX 8.1, with lower-case letters).
var variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// expander puts the values of environment variables into the scalars of a file.
type expander struct {
	*reporter
	lines  []string
	lookup func(name string) (value string, ok bool)
}

// expand replaces ${NAME} and ${NAME:-DEFAULT} in every value below n. It works on what YAML has made of the
// file: a variable is a part of one value, whatever is in it. Keys are left as they are.
func (x *expander) expand(n *node) {
	for _, e := range n.entries {
		x.expand(e.value)
	}
	for _, item := range n.items {
		x.expand(item)
	}
	if n.kind != kindText || !strings.Contains(n.text, "${") {
		return
	}
	from := n.pos
	written := n.text
	n.text = variable.ReplaceAllStringFunc(written, func(s string) string {
		at := x.find(s, from, n.pos)
		from = Pos{at.Line, at.Col + utf8.RuneCountInString(s)}
		if s == "$${" {
			return "${"
		}
		value, problem := x.value(s)
		if problem != "" {
			x.errorf(at, "%s", problem)
			n.kind = kindUnclear
			return ""
		}
		n.written = written
		return value
	})
}

// value is what s stands for, or what is wrong with s.
func (x *expander) value(s string) (value, problem string) {
	inner, closed := strings.CutSuffix(strings.TrimPrefix(s, "${"), "}")
	name, instead, hasDefault := strings.Cut(inner, ":-")
	switch {
	case !closed:
		return "", "the } of a variable is missing; write $${ for a literal ${"
	case !variableName.MatchString(name):
		return "", "a variable is ${NAME} or ${NAME:-DEFAULT}, and its name has letters, digits and _; " +
			"write $${ for a literal ${"
	case strings.Contains(instead, "${"):
		return "", "the default of ${" + name + "} can't have a variable in it"
	}
	value, ok := x.lookup(name)
	switch {
	case hasDefault && value == "":
		return instead, ""
	case !ok:
		return "", "the variable ${" + name + "} is not set: set it where the daemon is started (Environment= in a " +
			"unit of systemd), or write a default: ${" + name + ":-VALUE}"
	case !utf8.ValidString(value):
		return "", "the value of ${" + name + "} is not UTF-8 text"
	}
	return value, ""
}

// find is where s stands in the file, at from or behind it; instead where it is written in another way, such
// as over several lines.
func (x *expander) find(s string, from, instead Pos) Pos {
	if from.Line > len(x.lines) {
		return instead
	}
	line := []rune(x.lines[from.Line-1])
	start := min(from.Col-1, len(line))
	before, _, found := strings.Cut(string(line[start:]), s)
	if !found {
		return instead
	}
	return Pos{from.Line, start + utf8.RuneCountInString(before) + 1}
}
