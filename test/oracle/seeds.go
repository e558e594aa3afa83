package oracle

import (
	"bytes"
	_ "embed" // the seeds
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Seeds are pieces of messages that were of interest to those who wrote parsers. In each, HOST and PATH stand
// for a host and a path that mean something.
type Seeds struct {
	Targets, Hosts, Paths []string
	Fields                []Field
	Heads                 []string // whole heads of HTTP/1.1, with what follows
}

//go:embed seeds.txt
var seedText string

// AllSeeds are those of seeds.txt, which says where they are from.
func AllSeeds() (*Seeds, error) {
	s := &Seeds{}
	for i, line := range strings.Split(seedText, "\n") {
		if line == "" || line[0] == '#' {
			continue
		}
		kind, quoted, _ := strings.Cut(line, " ")
		text, err := strconv.Unquote(quoted)
		if err != nil {
			return nil, fmt.Errorf("seeds.txt:%d: %q: %w", i+1, quoted, err)
		}
		switch kind {
		case "target":
			s.Targets = append(s.Targets, text)
		case "host":
			s.Hosts = append(s.Hosts, text)
		case "path":
			s.Paths = append(s.Paths, text)
		case "field":
			name, value, ok := strings.Cut(text, ": ")
			if !ok {
				return nil, fmt.Errorf("seeds.txt:%d: a field is NAME: VALUE", i+1)
			}
			s.Fields = append(s.Fields, Field{name, value})
		case "head":
			s.Heads = append(s.Heads, text)
		default:
			return nil, fmt.Errorf("seeds.txt:%d: %q is no kind: target, host, path, field, head", i+1, kind)
		}
	}
	return s, nil
}

// fromSeed puts a seed into the message.
func (g *Grammar) fromSeed(c *Choices, m *Message) {
	s := g.Seeds
	if s == nil {
		return
	}
	fill := func(text string) string {
		text = strings.ReplaceAll(text, "HOST", g.host(c))
		return strings.ReplaceAll(text, "PATH", strings.TrimPrefix(g.path(c), "/"))
	}
	switch c.Int(6) {
	case 0:
		m.Target = fill(Pick(c, s.Targets...))
	case 1:
		m.Hosts = append(m.Hosts[:0], fill(Pick(c, s.Hosts...)))
	case 2, 3:
		m.Target = fill(Pick(c, s.Paths...))
	case 4:
		f := Pick(c, s.Fields...)
		m.Fields = append(m.Fields, Field{fill(f.Name), fill(f.Value)})
	case 5: // only bytes can be so wrong: those of HTTP/1.1
		m.Edits = append(m.Edits, Edit{At: 0, Cut: 1 << 20, Put: fill(Pick(c, s.Heads...))})
		m.Body = nil
	}
}

// AsHTTP2 is what a client sends that begins a connection of HTTP/2 with a message. That of an upgrade was
// stream 1.
func AsHTTP2(m *Message) []byte {
	b := appendFrame([]byte(http2.ClientPreface), http2.FrameSettings, 0, 0, nil)
	var block bytes.Buffer
	return append(b, m.HTTP2(3, "http", hpack.NewEncoder(&block), &block)...)
}
