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
	if g.Seeds == nil {
		return
	}
	all := g.Seeds.changes(g.host(c), g.path(c))
	kind := Pick(c, all[:]...)
	Pick(c, kind...)(m)
}

// Messages puts each seed into a message of its own, with a host and a path for those that stand for some.
func (s *Seeds) Messages(host, path string, plain func() *Message) (all []*Message) {
	for _, kind := range s.changes(host, path) {
		for _, change := range kind {
			m := plain()
			change(m)
			all = append(all, m)
		}
	}
	return all
}

// changes are what each seed does to a message, by kind.
func (s *Seeds) changes(host, path string) (all [5][]func(*Message)) {
	names := strings.NewReplacer("HOST", host, "PATH", strings.TrimPrefix(path, "/"))
	for _, text := range s.Targets {
		all[0] = append(all[0], func(m *Message) { m.Target = names.Replace(text) })
	}
	for _, text := range s.Hosts {
		all[1] = append(all[1], func(m *Message) { m.Hosts = []string{names.Replace(text)} })
	}
	for _, text := range s.Paths {
		all[2] = append(all[2], func(m *Message) { m.Target = names.Replace(text) })
	}
	for _, f := range s.Fields {
		all[3] = append(all[3], func(m *Message) {
			m.Fields = append(m.Fields, Field{names.Replace(f.Name), names.Replace(f.Value)})
		})
	}
	for _, text := range s.Heads { // only bytes can be so wrong: those of HTTP/1.1
		all[4] = append(all[4], func(m *Message) {
			m.Edits = append(m.Edits, Edit{At: 0, Cut: 1 << 20, Put: names.Replace(text)})
			m.Body = nil
		})
	}
	return all
}

// AsHTTP2 is what a client sends that begins a connection of HTTP/2 with a message. That of an upgrade was
// stream 1.
func AsHTTP2(m *Message) []byte {
	b := appendFrame([]byte(http2.ClientPreface), http2.FrameSettings, 0, 0, nil)
	var block bytes.Buffer
	return append(b, m.HTTP2(3, "http", hpack.NewEncoder(&block), &block)...)
}
