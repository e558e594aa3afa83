package config

import (
	"encoding/base64"
	"fmt"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// maxDepth is how deeply brackets, or dashes on one line, may nest. The configuration needs 5; the YAML
// library takes time and memory by the square of the depth.
const maxDepth = 32

// node is what the decoder sees of YAML: the plain part of it that JSON has too, with positions.
type node struct {
	kind    nodeKind
	pos     Pos
	text    string  // of a scalar: a text's value, or a number as it was written
	written string  // of a text in which variables were replaced: as it was before
	entries []entry // of a mapping, in order, duplicates included
	items   []*node // of a list
}

type entry struct {
	key   string
	pos   Pos
	value *node
}

type nodeKind uint8

const (
	kindMapping nodeKind = iota
	kindList
	kindText
	kindNumber
	kindBool
	kindNull
	kindUnclear // something that was already refused
)

func (n *node) isScalar() bool {
	return n.kind == kindText || n.kind == kindNumber || n.kind == kindBool
}

// String returns how messages call a value of this kind.
func (k nodeKind) String() string {
	return [...]string{"a mapping", "a list", "text", "a number", "true or false", "nothing", "something else"}[k]
}

// parseTree reads YAML and reports what makes it no single plain document. It returns nil when there is
// nothing to go on with.
func parseTree(r *reporter, data []byte) (root *node) {
	if len(data) > MaxFileBytes {
		r.errorf(Pos{1, 1}, "the file is larger than %d MiB", MaxFileBytes>>20)
		return nil
	}
	text, ok := cleanText(r, data)
	if !ok {
		return nil
	}
	t := &tree{reporter: r, text: text}

	// The library is careful, but reads what we did not write: a fault of it is an error, not our end.
	defer func() {
		if p := recover(); p != nil {
			r.errorf(Pos{1, 1}, "the YAML library cannot read this file (%v); please report it", p)
			root = nil
		}
	}()
	tokens := lexer.Tokenize(text)
	if !t.plain(tokens) || !t.noTabs(tokens) {
		return nil
	}
	if tokens = t.joinColons(tokens); tokens == nil {
		return nil
	}
	file, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		t.syntaxError(err)
		return nil
	}
	for _, doc := range file.Docs {
		if doc.Body == nil || doc.Body.Type() == ast.DirectiveType {
			continue
		}
		if root != nil {
			// Most often plain has seen the --- already.
			if len(r.errs) == 0 {
				r.errorf(t.pos(doc.Body.GetToken()), "a second document: a file holds one configuration")
			}
			break
		}
		root = t.node(doc.Body)
	}
	if root == nil && len(r.errs) == 0 {
		r.errorf(Pos{1, 1}, "the file is empty: it needs at least listeners, with listen, mode and a target")
	}
	return root
}

// cleanText refuses what is no UTF-8 text, and takes off a byte order mark.
func cleanText(r *reporter, data []byte) (string, bool) {
	s := string(data)
	if strings.HasPrefix(s, "\xff\xfe") || strings.HasPrefix(s, "\xfe\xff") {
		r.errorf(Pos{1, 1}, "the file is UTF-16: save it as UTF-8")
		return "", false
	}
	s = strings.TrimPrefix(s, "\ufeff")
	p := Pos{1, 1}
	for i, c := range s {
		switch {
		case c == '\n':
			p = Pos{p.Line + 1, 1}
			continue
		case c == utf8.RuneError && !strings.HasPrefix(s[i:], "\ufffd"):
			r.errorf(p, "byte 0x%02x is not UTF-8 text", s[i])
			return "", false
		case c == '\r' && strings.HasPrefix(s[i:], "\r\n"), c == '\t':
		case unicode.IsControl(c), c == '\u2028', c == '\u2029', c == '\ufeff':
			r.errorf(p, "the invisible character %U does not belong here", c)
			return "", false
		}
		p.Col++
	}
	return s, true
}

// tree turns the library's syntax tree into nodes.
type tree struct {
	*reporter
	text  string
	lines []string // of text, split when a message first needs them
}

// plain refuses by their tokens the parts of YAML that a configuration has no need of. It returns false
// when the rest is not worth parsing.
func (t *tree) plain(tokens token.Tokens) bool {
	var depth, line, onLine, documents int
	content, ended := false, false
	for i, tk := range tokens {
		switch tk.Type {
		case token.AnchorType:
			t.errorf(t.pos(tk), "anchors (&name) are not supported: write the value at each place that needs it")
		case token.AliasType:
			if i+1 < len(tokens) && strings.HasPrefix(tokens[i+1].Value, ".") {
				t.errorf(t.pos(tk), `a wildcard needs quotes: "*%s"`, clip(tokens[i+1].Value))
			} else {
				t.errorf(t.pos(tk), "aliases (*name) are not supported: write the value at each place that needs it; text that begins with * needs quotes")
			}
		case token.MergeKeyType:
			t.errorf(t.pos(tk), "merge keys (<<) are not supported: write the keys at each place that needs them")
		case token.TagType:
			t.errorf(t.pos(tk), "tags (!name) are not supported: text that begins with ! needs quotes")
		case token.MappingKeyType:
			t.errorf(t.pos(tk), "? keys are not supported: write key: value")
		case token.DirectiveType:
			if tk.Position.Column == 1 { // elsewhere it is a syntax error
				t.errorf(t.pos(tk), "directives (%%) are not supported")
				return false
			}
		case token.DocumentHeaderType:
			if documents++; content || documents > 1 {
				t.errorf(t.pos(tk), "a second document: a file holds one configuration, without --- in it")
				return false
			}
			continue
		case token.DocumentEndType:
			ended = true
			continue
		case token.CommentType:
			continue
		}
		if ended {
			t.errorf(t.pos(tk), "a second document: a file holds one configuration, without ... in it")
			return false
		}
		content = true
		if tk.Position.Line != line {
			line, onLine = tk.Position.Line, 0
		}
		switch tk.Type {
		case token.SequenceStartType, token.MappingStartType:
			depth++
		case token.SequenceEndType, token.MappingEndType:
			depth--
		case token.SequenceEntryType, token.MappingKeyType, token.AnchorType, token.TagType:
			onLine++
		case token.MappingValueType:
			if depth == 0 {
				onLine++
			}
		}
		if depth > maxDepth || onLine > maxDepth {
			t.errorf(t.pos(tk), "nested too deeply")
			return false
		}
	}
	return true
}

// noTabs refuses tabs, but for those in comments and at the ends of lines: the library drops a tab inside of
// an unquoted value silently, so that 12<tab>7.0.0.1 would be 127.0.0.1.
func (t *tree) noTabs(tokens token.Tokens) bool {
	if !strings.Contains(t.text, "\t") || tokens.InvalidToken() != nil {
		return true // an invalid token is a syntax error, and ends the tokens
	}
	comments := map[int]int{} // column by line
	for _, tk := range tokens {
		if tk.Type == token.CommentType {
			comments[tk.Position.Line] = tk.Position.Column
		}
	}
	t.split()
	for i, line := range t.lines {
		if col := comments[i+1]; col > 0 {
			line = string([]rune(line)[:min(col, utf8.RuneCountInString(line)+1)-1])
		}
		line = strings.TrimRight(line, " \t")
		if before, _, found := strings.Cut(line, "\t"); found {
			t.errorf(Pos{i + 1, utf8.RuneCountInString(before) + 1}, `a tab: use spaces, or \t in double quotes`)
			return false
		}
	}
	return true
}

// bareIPv6 finds an unquoted [::1]:443, which YAML takes for a list and something after it.
var bareIPv6 = regexp.MustCompile(`(^|[\s,\[:])(\[[0-9A-Fa-f:.%]*:[0-9A-Za-z:.%]*\]:\d+)`)

var digits = regexp.MustCompile(`^[-+]?[0-9]+$`)

// noSpace finds mode:sni, which YAML takes for one word.
var noSpace = regexp.MustCompile(`^[\s-]*[a-z_]+:\S`)

// syntaxError reports an error of the YAML parser, with help for the mistakes that people make most.
func (t *tree) syntaxError(err error) {
	var at Pos
	msg := err.Error()
	if e, ok := err.(interface {
		GetToken() *token.Token
		GetMessage() string
	}); ok {
		at, msg = t.pos(e.GetToken()), e.GetMessage()
	} else {
		at = Pos{1, 1}
	}
	// One line each: messages of the library may quote the text.
	msg = clip(strings.ReplaceAll(msg, "\n", " "))
	line := t.line(at.Line)
	switch m := bareIPv6.FindStringSubmatch(line); {
	case strings.Contains(msg, "'\t'"):
		msg = "YAML is indented with spaces, not with tabs"
	case strings.HasSuffix(before(line, at.Col), "$") && strings.Contains(msg, "must be specified"):
		msg = `within { } and [ ] a value with a variable needs quotes: "${NAME}"`
	case m != nil:
		msg = fmt.Sprintf(`an IPv6 address needs quotes: "%s"`, m[2])
	case strings.Contains(msg, "is a reserved character"):
		msg += ": put the value in quotes"
	case strings.Contains(msg, "unexpected directive"):
		msg = "a value that begins with % needs quotes"
	case noSpace.MatchString(line) && strings.Contains(msg, "non-map value"):
		msg = "a space is missing behind the ':'"
	case strings.Contains(msg, "non-map value"):
		msg = "KEY: VALUE is expected here"
	case strings.Contains(msg, "value is not allowed in this context") && !strings.Contains(msg, "mapping"):
		msg += ": check the indentation, or put the value in quotes"
	case strings.Contains(msg, "mapping value is not allowed"):
		msg = `": " is not allowed here: check the indentation, or put the value in quotes`
	}
	t.errorf(at, "not valid YAML: %s", msg)
}

// before returns what stands before a column of a line.
func before(line string, col int) string {
	r := []rune(line)
	return string(r[:min(max(col-1, 0), len(r))])
}

// pos returns the place of a token, always inside the file.
func (t *tree) pos(tk *token.Token) Pos {
	if tk == nil || tk.Position == nil {
		return Pos{1, 1}
	}
	p := Pos{max(1, tk.Position.Line), max(1, tk.Position.Column)}
	t.split()
	p.Line = min(p.Line, len(t.lines))
	p.Col = min(p.Col, utf8.RuneCountInString(t.lines[p.Line-1])+1)
	return p
}

func (t *tree) line(n int) string {
	t.split()
	if n < 1 || n > len(t.lines) {
		return ""
	}
	return t.lines[n-1]
}

func (t *tree) split() {
	if t.lines == nil {
		t.lines = strings.Split(t.text, "\n")
		for i, l := range t.lines {
			t.lines[i] = strings.TrimSuffix(l, "\r")
		}
	}
}

func (t *tree) node(n ast.Node) *node {
	switch n := n.(type) {
	case *ast.MappingNode:
		return t.mapping(n.Values, n.IsFlowStyle, n.GetToken())
	case *ast.MappingValueNode:
		return t.mapping([]*ast.MappingValueNode{n}, false, nil)
	case *ast.SequenceNode:
		list := &node{kind: kindList, pos: t.pos(n.Start)}
		for i, v := range n.Values {
			item := t.node(v)
			if item.kind == kindNull && i < len(n.Entries) && n.Entries[i] != nil {
				item.pos = t.pos(n.Entries[i].Start) // the dash: there is nothing behind it
			}
			list.items = append(list.items, item)
		}
		return list
	case *ast.StringNode:
		kind := kindText
		if isPlain(n.Token) && digits.MatchString(n.Value) {
			kind = kindNumber // too large for the library to call it one
		}
		return &node{kind: kind, pos: t.pos(n.Token), text: n.Value}
	case *ast.LiteralNode:
		return &node{kind: kindText, pos: t.pos(n.Start), text: n.Value.Value}
	case *ast.IntegerNode:
		return &node{kind: kindNumber, pos: t.pos(n.Token), text: n.Token.Value}
	case *ast.FloatNode:
		return &node{kind: kindNumber, pos: t.pos(n.Token), text: n.Token.Value}
	case *ast.InfinityNode:
		return &node{kind: kindNumber, pos: t.pos(n.Token), text: n.Token.Value}
	case *ast.NanNode:
		return &node{kind: kindNumber, pos: t.pos(n.Token), text: n.Token.Value}
	case *ast.BoolNode:
		text := "false"
		if n.Value {
			text = "true"
		}
		return &node{kind: kindBool, pos: t.pos(n.Token), text: text}
	case *ast.NullNode:
		return &node{kind: kindNull, pos: t.pos(n.Token)}
	case *ast.AnchorNode:
		return t.inner(n.Value, n.Start) // refused by plain; its value may have errors of its own
	case *ast.TagNode:
		return t.inner(n.Value, n.Start)
	case nil:
		return &node{kind: kindUnclear, pos: Pos{1, 1}}
	}
	at := t.pos(n.GetToken())
	if len(t.errs) == 0 {
		t.errorf(at, "YAML's %s is not supported here", strings.ToLower(n.Type().String()))
	}
	return &node{kind: kindUnclear, pos: at}
}

func (t *tree) inner(n ast.Node, start *token.Token) *node {
	if n == nil {
		return &node{kind: kindUnclear, pos: t.pos(start)}
	}
	in := t.node(n)
	if in.kind != kindMapping && in.kind != kindList {
		in.kind = kindUnclear
	}
	return in
}

func (t *tree) mapping(values []*ast.MappingValueNode, flow bool, start *token.Token) *node {
	m := &node{kind: kindMapping}
	for _, v := range values {
		if v.Key.IsMergeKey() {
			continue // refused by plain
		}
		var k ast.Node = v.Key
		if q, ok := k.(*ast.MappingKeyNode); ok && q.Value != nil { // "? key", refused by plain
			k = q.Value
		}
		tk := k.GetToken()
		key := tk.Value
		if s, ok := k.(*ast.StringNode); ok {
			key = s.Value
		}
		m.entries = append(m.entries, entry{key: key, pos: t.pos(tk), value: t.node(v.Value)})
	}
	// A block mapping begins with its first key; the library's own token is the colon after it.
	switch {
	case !flow && len(m.entries) > 0:
		m.pos = m.entries[0].pos
	case !flow && len(values) > 0:
		m.pos = t.pos(values[0].Key.GetToken())
	default:
		m.pos = t.pos(start)
	}
	return m
}

// clip keeps what messages quote from the file short and on one line, and secrets out of it.
func clip(s string) string {
	const most = 80
	s = masked(s)
	s = strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' }), " ")
	if utf8.RuneCountInString(s) > most {
		return string([]rune(s)[:most]) + "..."
	}
	return s
}

// masked leaves out what could be a secret, wherever it stands: a private key, the hash of a password, and
// the user and password of a URL.
func masked(s string) string {
	if isKey(s) {
		return "..."
	}
	if i := strings.Index(s, "$2"); i >= 0 {
		s = s[:i] + "$2..."
	}
	_, rest, ok := strings.Cut(s, "://")
	if !ok {
		rest = s
	}
	if at := strings.LastIndexByte(rest, '@'); at >= 0 && strings.Contains(rest[:at], ":") {
		s = s[:len(s)-len(rest)] + "..." + rest[at:]
	}
	return s
}

// isKey says whether text is a key or a certificate itself, in PEM or the base64 in it.
func isKey(s string) bool {
	if strings.Contains(s, "-----BEGIN") {
		return true
	}
	der, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(s), ""))
	return err == nil && len(der) > 32 && der[0] == 0x30 // an ASN.1 SEQUENCE
}
