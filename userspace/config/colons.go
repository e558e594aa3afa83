package config

import (
	"strings"
	"unicode/utf8"

	"github.com/goccy/go-yaml/token"
)

// joinColons puts together again what the YAML library's scanner wrongly splits: in { from: [tag:edge] } it
// takes tag for a key (goccy/go-yaml#832, open in v1.19.2). In YAML 1.2 a colon behind an unquoted word only
// ends it before a space or one of ,[]{} (section 7.3.3). Where that cannot be mended it is an error: two
// readings of one file are worse.
func (t *tree) joinColons(tokens token.Tokens) token.Tokens {
	joined := make(token.Tokens, 0, len(tokens))
	depth := 0
	for i := 0; i < len(tokens); i++ {
		tk := tokens[i]
		switch tk.Type {
		case token.SequenceStartType, token.MappingStartType:
			depth++
		case token.SequenceEndType, token.MappingEndType:
			depth--
		}
		if depth > 0 && isPlain(tk) && strings.Contains(tk.Value, ": ") {
			t.errorf(t.pos(tk), `": " in the middle of a value: a ',' is missing, or quotes`)
			return nil
		}
		if depth < 1 || tk.Type != token.MappingValueType || t.endsKey(tk.Position) {
			joined = append(joined, tk)
			continue
		}
		var before, after *token.Token
		if len(joined) > 0 {
			before = joined[len(joined)-1]
		}
		if i+1 < len(tokens) {
			after = tokens[i+1]
		}
		if isQuoted(before) {
			joined = append(joined, tk) // as in JSON: {"a":1}
			continue
		}
		start, text := tk, ":"
		if isPlain(before) {
			if !touches(before, tk) {
				t.errorf(t.pos(tk), "an unquoted ':' with a space before it: put the value in quotes")
				return nil
			}
			start, text = before, before.Value+":"
			joined = joined[:len(joined)-1]
		}
		if !isPlain(after) {
			t.errorf(t.pos(tk), "a space is missing behind the ':'")
			return nil
		}
		if text += after.Value; strings.Contains(text, ": ") {
			t.errorf(t.pos(start), `": " in the middle of a value: a ',' is missing, or quotes`)
			return nil
		}
		joined = append(joined, token.String(text, text, start.Position))
		i++
	}
	// The parser follows the links between tokens.
	for i, tk := range joined {
		tk.Prev, tk.Next = nil, nil
		if i > 0 {
			tk.Prev, joined[i-1].Next = joined[i-1], tk
		}
	}
	return joined
}

// endsKey reports whether what follows a colon makes it the end of a key.
func (t *tree) endsKey(colon *token.Position) bool {
	line := t.line(colon.Line)
	for range colon.Column {
		_, n := utf8.DecodeRuneInString(line)
		line = line[n:]
	}
	return line == "" || strings.ContainsRune(" \t,[]{}", rune(line[0]))
}

func isQuoted(tk *token.Token) bool {
	return tk != nil && (tk.Type == token.SingleQuoteType || tk.Type == token.DoubleQuoteType)
}

// isPlain reports whether a token is an unquoted scalar.
func isPlain(tk *token.Token) bool {
	if tk == nil {
		return false
	}
	switch tk.Type {
	case token.StringType, token.IntegerType, token.BinaryIntegerType, token.OctetIntegerType, token.HexIntegerType,
		token.FloatType, token.InfinityType, token.NanType, token.BoolType, token.NullType:
		return true
	}
	return false
}

// touches reports whether b begins where a, an unquoted token, ends.
func touches(a, b *token.Token) bool {
	return a.Position.Line == b.Position.Line && a.Position.Column+utf8.RuneCountInString(a.Value) == b.Position.Column
}
