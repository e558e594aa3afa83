package config

import (
	"encoding/base64"
	"fmt"
	"regexp"
	"strconv"
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
	t := &tree{reporter: r, lines: strings.Split(strings.ReplaceAll(text, "\r\n", "\n"), "\n")}

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
		return "", r.errorf(Pos{1, 1}, "the file is UTF-16: save it as UTF-8")
	}
	s = strings.TrimPrefix(s, "\ufeff")
	p := Pos{1, 1}
	for i, c := range s {
		switch {
		case c == '\n':
			p = Pos{p.Line + 1, 1}
			continue
		case c == utf8.RuneError && !strings.HasPrefix(s[i:], "\ufffd"):
			return "", r.errorf(p, "byte 0x%02x is not UTF-8 text", s[i])
		case c == '\r' && strings.HasPrefix(s[i:], "\r\n"), c == '\t':
		case unicode.IsControl(c), c == '\u2028', c == '\u2029', c == '\ufeff':
			return "", r.errorf(p, "the invisible character %U does not belong here", c)
		}
		p.Col++
	}
	return s, true
}

// tree turns the library's syntax tree into nodes.
type tree struct {
	*reporter
	lines []string
}

// unsupported are the parts of YAML that a configuration has no need of.
var unsupported = map[token.Type]string{
	token.AnchorType:     "anchors (&name) are not supported: write the value at each place that needs it",
	token.AliasType:      "aliases (*name) are not supported: write the value at each place that needs it; text that begins with * needs quotes",
	token.MergeKeyType:   "merge keys (<<) are not supported: write the keys at each place that needs them",
	token.TagType:        "tags (!name) are not supported: text that begins with ! needs quotes",
	token.MappingKeyType: "? keys are not supported: write key: value",
}

// plain refuses by their tokens the parts of YAML that are not supported. It returns false when the rest is
// not worth parsing.
func (t *tree) plain(tokens token.Tokens) bool {
	var n nesting
	var documents int
	content, ended := false, false
	for i, tk := range tokens {
		switch tk.Type {
		case token.DirectiveType:
			if tk.Position.Column == 1 { // elsewhere it is a syntax error
				return t.errorf(t.pos(tk), "directives (%%) are not supported")
			}
		case token.DocumentHeaderType:
			if documents++; content || documents > 1 {
				return t.errorf(t.pos(tk), "a second document: a file holds one configuration, without --- in it")
			}
			continue
		case token.DocumentEndType:
			ended = true
			continue
		case token.CommentType:
			continue
		}
		message, refused := unsupported[tk.Type]
		if tk.Type == token.AliasType && i+1 < len(tokens) && strings.HasPrefix(tokens[i+1].Value, ".") {
			message = fmt.Sprintf(`a wildcard needs quotes: "*%s"`, clip(tokens[i+1].Value))
		}
		t.errorIf(refused, t.pos(tk), "%s", message)
		if ended {
			return t.errorf(t.pos(tk), "a second document: a file holds one configuration, without ... in it")
		}
		content = true
		if n.add(tk); n.brackets > maxDepth || n.onLine > maxDepth {
			return t.errorf(t.pos(tk), "nested too deeply")
		}
	}
	return true
}

// nesting is how deep the last of some tokens stands.
type nesting struct {
	brackets     int // that are open
	line, onLine int // on the last line: dashes, keys and such
}

func (n *nesting) add(tk *token.Token) {
	if tk.Position.Line != n.line {
		n.line, n.onLine = tk.Position.Line, 0
	}
	switch tk.Type {
	case token.SequenceStartType, token.MappingStartType:
		n.brackets++
	case token.SequenceEndType, token.MappingEndType:
		n.brackets--
	case token.SequenceEntryType, token.MappingKeyType, token.AnchorType, token.TagType:
		n.onLine++
	case token.MappingValueType:
		if n.brackets == 0 {
			n.onLine++
		}
	}
}

// noTabs refuses tabs, but for those in comments and at the ends of lines: the library drops a tab inside of
// an unquoted value silently, so that 12<tab>7.0.0.1 would be 127.0.0.1.
func (t *tree) noTabs(tokens token.Tokens) bool {
	if tokens.InvalidToken() != nil {
		return true // it is a syntax error, and ends the tokens
	}
	comments := map[int]int{} // column by line
	for _, tk := range tokens {
		if tk.Type == token.CommentType {
			comments[tk.Position.Line] = tk.Position.Column
		}
	}
	for i, line := range t.lines {
		if col := comments[i+1]; col > 0 {
			line = string([]rune(line)[:min(col, utf8.RuneCountInString(line)+1)-1])
		}
		line = strings.TrimRight(line, " \t")
		if before, _, found := strings.Cut(line, "\t"); found {
			return t.errorf(Pos{i + 1, utf8.RuneCountInString(before) + 1}, `a tab: use spaces, or \t in double quotes`)
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
	at, msg := Pos{1, 1}, err.Error()
	if e, ok := err.(interface {
		GetToken() *token.Token
		GetMessage() string
	}); ok {
		at, msg = t.pos(e.GetToken()), e.GetMessage()
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
	line := min(max(1, tk.Position.Line), len(t.lines))
	return Pos{line, min(max(1, tk.Position.Column), utf8.RuneCountInString(t.lines[line-1])+1)}
}

func (t *tree) line(n int) string {
	if n < 1 || n > len(t.lines) {
		return ""
	}
	return t.lines[n-1]
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
	case *ast.IntegerNode, *ast.FloatNode, *ast.InfinityNode, *ast.NanNode:
		return &node{kind: kindNumber, pos: t.pos(n.GetToken()), text: n.GetToken().Value}
	case *ast.BoolNode:
		return &node{kind: kindBool, pos: t.pos(n.Token), text: strconv.FormatBool(n.Value)}
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
