package main

import (
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/tailsplice/tailsplice/userspace/flow"
)

// terminal escapes on the way to a writer what commands a terminal and encoding/json and log/slog leave as it
// is: DEL and C1 (U+0080 to U+009F), and C0 but for line breaks and tabs. The escapes are JSON's, since most
// writers here write JSON.
type terminal struct{ io.Writer }

func (t terminal) Write(b []byte) (int, error) {
	if !mayCommand(b) {
		return t.Writer.Write(b)
	}
	out := make([]byte, 0, len(b)+16)
	for rest := b; len(rest) > 0; {
		r, n := utf8.DecodeRune(rest)
		if commands(r) {
			out = fmt.Appendf(out, `\u%04x`, r)
		} else {
			out = append(out, rest[:n]...)
		}
		rest = rest[n:]
	}
	if _, err := t.Writer.Write(out); err != nil {
		return 0, err
	}
	return len(b), nil
}

// mayCommand is a quick look, since nearly no line commands anything. C1 begins with 0xc2 in UTF-8, and so
// does little else.
func mayCommand(b []byte) bool {
	for _, c := range b {
		if c < ' ' && c != '\n' && c != '\t' || c == 0x7f || c == 0xc2 {
			return true
		}
	}
	return false
}

func commands(r rune) bool { return unicode.IsControl(r) && r != '\n' && r != '\t' }

// printable changes all texts in v, a pointer to what JSON can hold, so that each stays on its line and
// commands no terminal: authorities, containers and other daemons may say anything.
func printable(v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var tree any
	d := json.NewDecoder(strings.NewReader(string(raw)))
	d.UseNumber()
	if err := d.Decode(&tree); err != nil {
		return err
	}
	if raw, err = json.Marshal(visible(tree)); err != nil {
		return err
	}
	reflect.ValueOf(v).Elem().SetZero() // else a map keeps its old keys
	return json.Unmarshal(raw, v)
}

// printableFlow is printable for one of many flows: all of its texts that others choose.
func printableFlow(f *flow.Snapshot) {
	for _, s := range []*string{&f.ID, &f.Listener, &f.Route, &f.Name, &f.Client, &f.Downstream, &f.Upstream, &f.Target, &f.Datapath} {
		*s = visibleText(*s)
	}
}

func visible(v any) any {
	switch v := v.(type) {
	case string:
		return visibleText(v)
	case []any:
		for i := range v {
			v[i] = visible(v[i])
		}
	case map[string]any:
		out := make(map[string]any, len(v))
		for key, value := range v {
			out[visibleText(key)] = visible(value)
		}
		return out
	}
	return v
}

func visibleText(s string) string {
	if !strings.ContainsFunc(s, hidden) {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if hidden(r) {
			q := strconv.QuoteRuneToASCII(r)
			b.WriteString(q[1 : len(q)-1])
		} else {
			b.WriteRune(r)
		}
	}
	return b.String()
}

// hidden says whether r can't be seen: a control, or a format character that reorders text.
func hidden(r rune) bool { return !unicode.IsGraphic(r) }
