// Package reference writes the pages of docs/reference and the man pages: what is said once becomes Markdown
// and roff. It is for the tests that `go generate` runs, so that none of it is in the daemon.
//
// Text may have `code` and [links](of Markdown) in it; a man page has the words of a link alone.
package reference

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode"
)

// Page is a page that grows from top to bottom. The zero Page is empty.
type Page struct {
	Depth int // how many levels its headings are below the usual ones, on the web

	blocks []block
}

// block is a part of a page in both forms. An empty one is left out.
type block struct{ markdown, man string }

func (p *Page) add(markdown, man string) { p.blocks = append(p.blocks, block{markdown, man}) }

// Heading begins a section; level 1 is the largest below the title.
func (p *Page) Heading(level int, text string) {
	man := ".SH " + quote(strings.ToUpper(text))
	if level > 1 {
		man = ".SS " + quote(text)
	}
	p.add(strings.Repeat("#", p.Depth+level+1)+" "+text, man)
}

// Text adds paragraphs, with an empty line between them. One whose first line is indented stays as it is.
func (p *Page) Text(text string) {
	for paragraph := range strings.SplitSeq(strings.TrimSpace(text), "\n\n") {
		if strings.HasPrefix(paragraph, "  ") {
			p.Code("", strings.ReplaceAll(paragraph[2:], "\n  ", "\n"))
			continue
		}
		p.add(wrap(paragraph), ".PP\n"+roff(paragraph))
	}
}

// Web adds what is Markdown only, such as a list of links.
func (p *Page) Web(markdown string) { p.add(markdown, "") }

// Man adds a section that only a man page has.
func (p *Page) Man(heading, text string) { p.add("", ".SH "+quote(heading)+"\n"+roff(text)) }

// Code adds an example as it is typed; lang is that of a fenced block.
func (p *Page) Code(lang, text string) {
	text = strings.TrimRight(text, "\n")
	var man strings.Builder
	for line := range strings.SplitSeq(text, "\n") {
		man.WriteString(protect(escape(line)) + "\n")
	}
	p.add("```"+lang+"\n"+text+"\n```", ".PP\n.RS 4\n.nf\n"+man.String()+".fi\n.RE")
}

// Items adds a list of terms and what each of them means.
func (p *Page) Items(items [][2]string) {
	var markdown, man strings.Builder
	for _, i := range items {
		fmt.Fprintf(&markdown, "- %s: %s\n", i[0], i[1])
		fmt.Fprintf(&man, ".TP\n%s\n%s\n", roff(i[0]), roff(i[1]))
	}
	p.add(strings.TrimRight(markdown.String(), "\n"), strings.TrimRight(man.String(), "\n"))
}

// Entry adds a term that has a section of its own on the web: what it means, facts of it a line each, and an
// example.
func (p *Page) Entry(level int, path, term, text string, facts []string, lang, example string) {
	var markdown, man strings.Builder
	fmt.Fprintf(&markdown, "%s `%s`\n\n%s\n\n", strings.Repeat("#", level+1), path, wrap(text))
	fmt.Fprintf(&man, ".TP\n\\fB%s\\fR\n%s\n", escape(term), roff(text))
	for _, f := range facts {
		markdown.WriteString("- " + f + "\n")
		man.WriteString(".br\n" + roff(f) + "\n")
	}
	fmt.Fprintf(&markdown, "\n```%s\n%s\n```", lang, example)
	fmt.Fprintf(&man, ".br\nExample: \\fB%s\\fR", escape(example))
	p.add(markdown.String(), man.String())
}

// Append adds all of another page.
func (p *Page) Append(other *Page) { p.blocks = append(p.blocks, other.blocks...) }

// Markdown is the page for docs/reference. from says what it is made of, and how.
func (p *Page) Markdown(title, from string) string {
	parts := []string{"<!-- Made of " + from + " by `go generate ./...`: change it there. -->", "# " + title}
	for _, b := range p.blocks {
		if b.markdown != "" {
			parts = append(parts, b.markdown)
		}
	}
	return strings.Join(parts, "\n\n") + "\n"
}

// ManPage is the page for man, such as tailsplice-run in section 8.
func (p *Page) ManPage(name string, section int, short, from string) string {
	parts := []string{`.\" Made of ` + from + " by `go generate ./...`: change it there.",
		fmt.Sprintf(".TH %s %d \"\" tailsplice \"tailsplice manual\"", quote(strings.ToUpper(name)), section),
		".nh\n.ad l", ".SH NAME\n" + escape(name) + ` \- ` + roff(short)}
	for _, b := range p.blocks {
		if b.man != "" {
			parts = append(parts, b.man)
		}
	}
	return strings.Join(parts, "\n") + "\n"
}

// Current fails if a file does not have this text, or writes it with update.
func Current(t *testing.T, update bool, file, text string) {
	t.Helper()
	if update {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(file)
	if err != nil {
		t.Error(err)
	} else if !bytes.Equal(have, []byte(text)) {
		t.Errorf("%s is not what the code says: run go generate ./... and commit it", file)
	}
}

// Anchor is the link to a heading of the same page, as GitHub makes it.
func Anchor(heading string) string {
	heading = link.ReplaceAllString(strings.ToLower(heading), "$1")
	return "#" + strings.Map(func(r rune) rune {
		switch {
		case unicode.IsLetter(r), unicode.IsDigit(r), r == '_', r == '-':
			return r
		case r == ' ':
			return '-'
		}
		return -1
	}, heading)
}

var (
	link = regexp.MustCompile(`\[([^\]]+)\]\([^)]+\)`)
	code = regexp.MustCompile("`([^`]+)`")
)

// roff is text as man pages have it.
func roff(text string) string {
	text = link.ReplaceAllString(text, "$1")
	var out strings.Builder
	last := 0
	for _, m := range code.FindAllStringSubmatchIndex(text, -1) {
		out.WriteString(escape(text[last:m[0]]) + `\fB` + escape(text[m[2]:m[3]]) + `\fR`)
		last = m[1]
	}
	out.WriteString(escape(text[last:]))
	var lines []string
	for line := range strings.SplitSeq(wrap(out.String()), "\n") {
		lines = append(lines, protect(line))
	}
	return strings.Join(lines, "\n")
}

// escape has roff take text as it is.
func escape(text string) string {
	return strings.NewReplacer(`\`, `\e`, "-", `\-`, "\u2192", `\(->`).Replace(text)
}

// protect keeps a line from being read as a request of roff.
func protect(line string) string {
	if strings.HasPrefix(line, ".") || strings.HasPrefix(line, "'") {
		return `\&` + line
	}
	return line
}

func quote(text string) string { return `"` + escape(strings.ReplaceAll(text, "`", "")) + `"` }

// wrap breaks text into lines of at most 110 bytes, as far as its words allow.
func wrap(text string) string {
	var out strings.Builder
	width := 0
	for i, word := range strings.Fields(text) {
		switch {
		case i > 0 && width+1+len(word) > 110:
			out.WriteString("\n")
			width = 0
		case i > 0:
			out.WriteString(" ")
			width++
		}
		out.WriteString(word)
		width += len(word)
	}
	return out.String()
}
