// Package deny holds the prefixes that nobody may come from: tables that don't change, and files of them that
// are followed.
package deny

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"unicode/utf8"

	"github.com/gaissmai/bart"
)

// Table is a set of prefixes, which does not change. 200,000 of them take 10 to 17 MB, and looking one up
// less than two microseconds. The nil Table has none.
type Table struct {
	trie bart.Lite
	none bool // its file says that nobody is meant
	all  bool // its file has not been read: whom it means is not known
}

// NewTable makes a table of prefixes.
func NewTable(prefixes ...netip.Prefix) *Table {
	t := &Table{}
	for _, p := range prefixes {
		t.trie.Insert(p)
	}
	return t
}

// Contains reports whether a is in one of the prefixes. An IPv4 address mapped into IPv6 is the IPv4 address,
// and zones don't count.
func (t *Table) Contains(a netip.Addr) bool {
	return t != nil && (t.all || t.trie.Contains(a.Unmap().WithZone("")))
}

// Len is how many different prefixes there are.
func (t *Table) Len() int {
	if t == nil {
		return 0
	}
	return t.trie.Size()
}

const (
	maxFileBytes = 64 << 20 // ten times what 200,000 prefixes take
	maxLineBytes = 4 << 10
	maxShown     = 10 // how many bad lines an error shows
)

// Parse is how a line becomes a prefix, without bits behind its length. Its error says what is wrong with the
// line.
type Parse func(line string) (netip.Prefix, error)

// sayNone is the comment of a file without prefixes that is meant to have none.
const sayNone = "# none"

// read makes a table of lines with a prefix each. Empty lines are skipped, and what # or ; begins. With an
// error, which says name:LINE:COL for each line that is wrong, there is no table.
func read(name string, r io.Reader, parse Parse) (*Table, error) {
	t := &Table{}
	var bad []error
	wrong := 0
	lines := bufio.NewScanner(io.LimitReader(r, maxFileBytes+1))
	lines.Buffer(make([]byte, 0, 4<<10), maxLineBytes)
	n, size := 0, 0
	for ; lines.Scan(); size += len(lines.Bytes()) + 1 {
		n++
		line := lines.Text()
		if n == 1 {
			line = strings.TrimPrefix(line, "\ufeff")
		}
		t.none = t.none || strings.TrimSpace(line) == sayNone
		text, _, _ := strings.Cut(line, "#")
		text, _, _ = strings.Cut(text, ";")
		start := text[:len(text)-len(strings.TrimLeft(text, " \t"))]
		if text = strings.TrimSpace(text); text == "" {
			continue
		}
		p, err := parse(text)
		if err == nil {
			t.trie.Insert(p)
			continue
		}
		if wrong++; wrong <= maxShown {
			col := utf8.RuneCountInString(start) + 1
			bad = append(bad, fmt.Errorf("%s:%d:%d: %q: %w", name, n, col, clip(text), err))
		}
	}
	switch err := lines.Err(); {
	case errors.Is(err, bufio.ErrTooLong):
		bad = append(bad, fmt.Errorf("%s:%d:1: the line is longer than %d KiB: write one prefix on each",
			name, n+1, maxLineBytes>>10))
	case err != nil:
		return nil, err
	case size > maxFileBytes:
		return nil, fmt.Errorf("%s is larger than %d MiB", name, maxFileBytes>>20)
	}
	if wrong > maxShown {
		bad = append(bad, fmt.Errorf("%s: %d more lines are wrong", name, wrong-maxShown))
	}
	if len(bad) > 0 {
		return nil, errors.Join(bad...)
	}
	return t, nil
}

// clip keeps short what a message quotes.
func clip(s string) string {
	const most = 80
	if utf8.RuneCountInString(s) > most {
		return string([]rune(s)[:most]) + "..."
	}
	return s
}
