package lab

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// A Page is one of this repository, such as README.md.
type Page struct{ text string }

// ReadPage reads a page, by its name in the repository.
func ReadPage(name string) (Page, error) {
	root, err := Root()
	if err != nil {
		return Page{}, err
	}
	text, err := os.ReadFile(filepath.Join(root, name))
	return Page{string(text)}, err
}

// Section is the part below a heading.
func (p Page) Section(heading string) Page {
	_, text, _ := strings.Cut(p.text, "\n"+heading+"\n")
	text, _, _ = strings.Cut(text, "\n## ")
	return Page{text}
}

// Blocks are the blocks of sh.
func (p Page) Blocks() (blocks []string) {
	for _, m := range regexp.MustCompile("(?ms)^ *```sh\n(.*?)^ *```$").FindAllStringSubmatch(p.text, -1) {
		blocks = append(blocks, m[1])
	}
	return blocks
}

// Commands are those that the text has in backticks.
func (p Page) Commands() (commands []string) {
	command := regexp.MustCompile("`((?:sudo|make|tailsplice|systemd-analyze)\\s[^`]+)`")
	for _, m := range command.FindAllStringSubmatch(p.text, -1) {
		commands = append(commands, strings.Join(strings.Fields(m[1]), " "))
	}
	return commands
}
