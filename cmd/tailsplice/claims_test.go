package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/rogpeppe/go-internal/txtar"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/tailsplice/tailsplice/userspace/config"
)

// TestClaims compares what the pages and the commented examples say with the code. In them,
//
//   - a block of YAML is a configuration that loads, or a part of one: of any of its sections.
//     A block that is for another program begins with ```yaml foreign;
//   - a command line of tailsplice, in a block of sh or in backticks, parses;
//   - make's targets and variables exist;
//   - `key: value` and `section.key` fit the schema, and `section.key` (VALUE) names its default;
//   - words_with_underscores in backticks are keys, reasons or fields: strings of the code, or of deploy;
//   - tests exist, or begin as those in a block of sh do;
//   - metrics, TAILSPLICE_ variables, flags, paths of this repository, links and anchors exist;
//   - a number that is a constant of the code has an HTML comment behind it, which names the file and quotes
//     the line: <!-- userspace/vhost/route.go: avoidFor = 10 * time.Second -->. When the code changes, the
//     quote is not found, and the sentence before it has to be read again.
func TestClaims(t *testing.T) {
	c := newClaims(t, "../..")
	pages := 0
	err := filepath.WalkDir(c.root, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(c.root, file)
		hidden := strings.HasPrefix(d.Name(), ".") && name != "."
		commented := strings.HasPrefix(name, "examples/") || strings.HasPrefix(name, "deploy/")
		switch {
		case d.IsDir() && (name == "build" || d.Name() == "testdata" || hidden):
			return filepath.SkipDir
		case strings.HasSuffix(name, ".md"), strings.HasSuffix(name, ".yaml") && commented:
			text, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			pages++
			for _, wrong := range c.page(name, string(text)) {
				t.Error(wrong)
			}
		}
		return nil
	})
	if err != nil || pages < 30 {
		t.Fatalf("read %d pages: %v", pages, err)
	}
	for _, cmd := range c.commands {
		for _, wrong := range c.shell(cmd.Example, true) {
			t.Errorf("the example in %s --help: %s", cmd.CommandPath(), wrong)
		}
	}
}

// TestClaimsFindsErrors plants errors and compares what is said about them.
func TestClaimsFindsErrors(t *testing.T) {
	c := newClaims(t, "../..")
	archive, err := txtar.ParseFile("testdata/claims.txtar")
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(archive.Files); i += 2 {
		page, want := archive.Files[i], strings.TrimSpace(string(archive.Files[i+1].Data))
		if got := strings.Join(c.page(page.Name, string(page.Data)), "\n"); got != want {
			t.Errorf("%s\nis said to have:\n%s\nwant:\n%s", page.Data, got, want)
		}
	}
}

// TestCommentedDefaults: the limits in comments in examples/edge.yaml are the defaults, as it says.
func TestCommentedDefaults(t *testing.T) {
	c := newClaims(t, "../..")
	text, err := os.ReadFile("../../examples/edge.yaml")
	if err != nil {
		t.Fatal(err)
	}
	commented := regexp.MustCompile(`(?m)^# +(\w+): +(\S+)`).FindAllStringSubmatch(string(text), -1)
	found := 0
	for _, m := range commented {
		for _, p := range c.places("limits." + m[1]) {
			if p.def != "" {
				found++
				if p.def != m[2] {
					t.Errorf("examples/edge.yaml: limits.%s: %s, and its default is %s", m[1], m[2], p.def)
				}
			}
		}
	}
	if found < 8 {
		t.Errorf("found %d limits in examples/edge.yaml", found)
	}
}

// claims is what pages are compared with.
type claims struct {
	root     string
	schema   []place
	commands []*cobra.Command
	folders  string // the repository's, as alternatives of a regular expression
	makefile string
	code     string // of Go, without tests
	deploy   string // what is installed with it
	tests    string
	bench    string // its command line
}

// place is a key of the configuration.
type place struct {
	path   string // dotted, such as listeners.routes.host
	def    string
	schema *jsonschema.Schema
	node   map[string]any
}

// foreignFlags are of other programs, and stand alone in backticks.
var foreignFlags = map[string]string{
	"netfilter-mode": "tailscale", "accept-dns": "tailscale",
	"reverse-proxy": "oauth2-proxy", "upstream": "oauth2-proxy",
}

// foreignWords are of other programs.
var foreignWords = map[string]string{"sk_psock_backlog": "Linux", "copied_seq": "Linux", "ssl_preread": "nginx", "rp_filter": "Linux"}

func newClaims(t *testing.T, root string) *claims {
	c := &claims{root: root}
	c.readSchema(t)
	top := newRoot()
	top.InitDefaultHelpCmd()
	top.InitDefaultCompletionCmd("completion")
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		cmd.InitDefaultHelpFlag()
		cmd.InitDefaultVersionFlag()
		c.commands = append(c.commands, cmd)
		for _, sub := range cmd.Commands() {
			walk(sub)
		}
	}
	walk(top)

	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	var folders []string
	for _, e := range entries {
		if e.IsDir() && e.Name() != "build" && !strings.HasPrefix(e.Name(), ".") {
			folders = append(folders, regexp.QuoteMeta(e.Name()))
		}
	}
	c.folders = strings.Join(folders, "|")
	var code, tests, bench strings.Builder
	err = filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(file, ".go") {
			return err
		}
		text, err := os.ReadFile(file)
		switch {
		case strings.HasSuffix(file, "_test.go"):
			tests.Write(text)
		case strings.HasPrefix(filepath.ToSlash(file), root+"/test/bench/"):
			bench.Write(text)
		default:
			code.Write(text)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	makefile, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	c.deploy = readAll(t, filepath.Join(root, "deploy"))
	c.code, c.tests, c.bench, c.makefile = code.String(), tests.String(), bench.String(), string(makefile)
	return c
}

func readAll(t *testing.T, folder string) string {
	var all strings.Builder
	err := filepath.WalkDir(folder, func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := os.ReadFile(file)
		all.Write(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all.String()
}

// readSchema lists the places of all keys.
func (c *claims) readSchema(t *testing.T) {
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(string(config.Schema())))
	if err != nil {
		t.Fatal(err)
	}
	compiler := jsonschema.NewCompiler()
	if err := compiler.AddResource("schema.json", doc); err != nil {
		t.Fatal(err)
	}
	var walk func(node map[string]any, pointer, dotted string)
	walk = func(node map[string]any, pointer, dotted string) {
		if props, ok := node["properties"].(map[string]any); ok && node["type"] == "object" {
			for key, v := range props {
				at := place{path: strings.TrimPrefix(dotted+"."+key, "."), node: v.(map[string]any)}
				if d, ok := at.node["default"]; ok {
					at.def = fmt.Sprint(d)
				}
				to := pointer + "/properties/" + key
				if at.schema, err = compiler.Compile("schema.json#" + to); err != nil {
					t.Fatal(err)
				}
				c.schema = append(c.schema, at)
				walk(at.node, to, at.path)
			}
		}
		if items, ok := node["items"].(map[string]any); ok {
			walk(items, pointer+"/items", dotted)
		}
		either, _ := node["anyOf"].([]any)
		for i, v := range either {
			walk(v.(map[string]any), fmt.Sprintf("%s/anyOf/%d", pointer, i), dotted)
		}
	}
	walk(doc.(map[string]any), "", "")
}

// places are those of a key, or of the end of a dotted path.
func (c *claims) places(key string) []place {
	var out []place
	for _, p := range c.schema {
		if p.path == key || strings.HasSuffix(p.path, "."+key) {
			out = append(out, p)
		}
	}
	return out
}

var (
	fence    = regexp.MustCompile("(?ms)^[ \t]*```([^\n]*)\n(.*?)^[ \t]*```[ \t]*$")
	span     = regexp.MustCompile("`([^`\n]+(?:\n[^`\n]+)*)`(?:\\s\\(([^()]*)\\))?")
	quote    = regexp.MustCompile(`(?s)<!--\s*(\S+\.\w+): (.*?)\s*-->`)
	link     = regexp.MustCompile(`\]\(([^()\s]+)\)|(?:src|srcset|href)="([^"]+)"`)
	heading  = regexp.MustCompile(`(?m)^#+ +(.*)$`)
	metric   = regexp.MustCompile(`\btailsplice_([a-z_]*[a-z])\b`)
	envName  = regexp.MustCompile(`\bTAILSPLICE_[A-Z_]+\b`)
	testName = regexp.MustCompile(`\b(?:Test|Fuzz|Benchmark)[A-Z]\w*`)
	aTest    = regexp.MustCompile(`^(?:Test|Fuzz|Benchmark)[A-Z]\w*$`)
	keyed    = regexp.MustCompile(`^[a-z_]+: \S`)
	snake    = regexp.MustCompile(`^[a-z]+(?:_[a-z0-9]+)+$`)
	dotted   = regexp.MustCompile(`^[a-z_]+(?:\.[a-z_]+)+$`)
	// notInSlug is what GitHub leaves out of a heading's anchor.
	notInSlug = regexp.MustCompile(`[^\p{L}\p{N} _-]`)

	number = regexp.MustCompile(`^[0-9][0-9,.]* ?(?:[a-zA-Z]{1,3}|/[smh])?$`)
	aFlag  = regexp.MustCompile(`(?:^|\s)--([a-z][a-z-]*)`)
)

// page returns what is wrong in one, as NAME:LINE: what is wrong, and what to do.
func (c *claims) page(name, text string) (wrong []string) {
	complain := func(at int, format string, args ...any) {
		line := 1 + strings.Count(text[:at], "\n")
		wrong = append(wrong, fmt.Sprintf("%s:%d: %s", name, line, fmt.Sprintf(format, args...)))
	}
	isPage := strings.HasSuffix(name, ".md")
	prose := text
	if !isPage {
		if strings.HasSuffix(name, ".yaml") && strings.Contains(text, "\nlisteners:") {
			if _, err := config.Parse(name, []byte(text)); err != nil {
				wrong = append(wrong, err.Error())
			}
		}
	} else {
		for _, m := range fence.FindAllStringSubmatchIndex(text, -1) {
			body := text[m[4]:m[5]]
			switch strings.TrimSpace(text[m[2]:m[3]]) {
			case "yaml":
				if err := c.config(name, body, strings.Count(text[:m[4]], "\n")); err != nil {
					wrong = append(wrong, err.Error())
				}
			case "sh", "console":
				at := m[4]
				for _, m := range testName.FindAllStringIndex(body, -1) {
					if name := body[m[0]:m[1]]; !strings.Contains(c.tests, "\nfunc "+name) {
						complain(at+m[0], "there is no test %s", name)
					}
				}
				for _, line := range commandLine.FindAllString(body, -1) {
					for _, w := range c.shell(line, true) {
						complain(at, "%s", w)
					}
					at += len(line)
				}
			}
			prose = prose[:m[0]] + blank(text[m[0]:m[1]]) + prose[m[1]:]
		}
		quotes := quote.FindAllStringSubmatchIndex(prose, -1)
		for _, m := range quotes {
			file, quoted := prose[m[2]:m[3]], prose[m[4]:m[5]]
			if source, err := os.ReadFile(filepath.Join(c.root, file)); err != nil {
				complain(m[0], "there is no %s: name the file that the sentence before is about now", file)
			} else if !strings.Contains(oneSpace(string(source)), oneSpace(quoted)) {
				complain(m[0], "%s has no %q any more: see whether the sentence before still holds, "+
					"then quote the new line", file, oneSpace(quoted))
			}
			prose = prose[:m[0]] + blank(prose[m[0]:m[1]]) + prose[m[1]:]
			text = text[:m[0]] + blank(text[m[0]:m[1]]) + text[m[1]:]
		}
		plain := span.ReplaceAllStringFunc(prose, blank)
		for _, m := range link.FindAllStringSubmatchIndex(plain, -1) {
			at := max(m[2], m[4])
			to := plain[at:max(m[3], m[5])]
			if err := c.link(name, text, to); err != nil {
				complain(at, "%v", err)
			}
		}
	}
	for _, m := range span.FindAllStringSubmatchIndex(prose, -1) {
		beside := ""
		if m[4] >= 0 {
			beside = prose[m[4]:m[5]]
		}
		for _, w := range c.span(oneSpace(prose[m[2]:m[3]]), beside) {
			complain(m[2], "%s", w)
		}
	}
	for _, m := range metric.FindAllStringSubmatchIndex(text, -1) {
		base := regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(text[m[2]:m[3]], "")
		if !strings.Contains(c.code, `"tailsplice_`+base+`"`) && !strings.Contains(c.code, `("`+base+`"`) {
			complain(m[0], "no metric is called %s: see userspace/metrics", text[m[0]:m[1]])
		}
	}
	for _, m := range envName.FindAllStringIndex(text, -1) {
		if v := `"` + text[m[0]:m[1]] + `"`; !strings.Contains(c.code, v) && !strings.Contains(c.tests, v) {
			complain(m[0], "nothing reads the variable %s", text[m[0]:m[1]])
		}
	}
	files := regexp.MustCompile("(?m)(?:^|[\\s(\"'`=])(?:\\./)?((?:" + c.folders + ")/[\\w.*/-]*[\\w*/])")
	for _, m := range files.FindAllStringSubmatchIndex(text, -1) {
		file := strings.TrimSuffix(text[m[2]:m[3]], "/...")
		found, _ := filepath.Glob(filepath.Join(c.root, file))
		beside, _ := filepath.Glob(filepath.Join(c.root, path.Dir(name), file))
		if len(found)+len(beside) == 0 {
			complain(m[2], "there is no %s in this repository: name where it is now", file)
		}
	}
	slices.SortStableFunc(wrong, func(a, b string) int { return lineOf(a) - lineOf(b) })
	return wrong
}

// isQuoted reports whether code has s as a string, or as the name in a struct's tag. A regular expression would
// take far longer.
func isQuoted(code, s string) bool {
	for _, q := range []string{`"`, "`"} {
		for _, end := range []string{`"`, "`", ","} {
			if strings.Contains(code, q+s+end) {
				return true
			}
		}
	}
	return false
}

func lineOf(s string) (n int) {
	_, rest, _ := strings.Cut(s, ":")
	fmt.Sscanf(rest, "%d", &n)
	return n
}

// blank keeps lines and lengths.
func blank(s string) string {
	b := []byte(s)
	for i := range b {
		if b[i] != '\n' {
			b[i] = ' '
		}
	}
	return string(b)
}

func oneSpace(s string) string { return strings.Join(strings.Fields(s), " ") }

// span judges what stands in backticks; beside is what stands in parentheses behind it.
func (c *claims) span(s, beside string) (wrong []string) {
	first, _, _ := strings.Cut(s, " ")
	_, _, isCommand := c.find(strings.Fields(s))
	switch {
	case aTest.MatchString(s):
		if !strings.Contains(c.tests, "\nfunc "+s+"(") {
			wrong = append(wrong, "there is no test "+s)
		}
	case first == "make" || strings.Contains(s, "tailsplice "):
		wrong = c.shell(s, false)
	case isCommand && strings.Contains(s, " -"):
		wrong = c.shell("tailsplice "+s, false)
	case strings.HasPrefix(s, "--"):
		for _, m := range aFlag.FindAllStringSubmatch(s, -1) {
			if foreignFlags[m[1]] == "" && !strings.Contains(c.bench, `"`+m[1]+`"`) && !c.hasFlag(m[1]) {
				wrong = append(wrong, fmt.Sprintf("no command has the flag --%s: name one that exists, "+
					"or that of another program in foreignFlags", m[1]))
			}
		}
	case snake.MatchString(s) && !strings.HasPrefix(s, "tailsplice_"):
		known := isQuoted(c.code, s) || isQuoted(c.bench, s) || strings.Contains(c.deploy, s) || len(c.places(s)) > 0
		if !known && foreignWords[s] == "" {
			wrong = append(wrong, fmt.Sprintf("nothing in the code is called %s: name what is, "+
				"or add what is of another program to foreignWords", s))
		}
	case keyed.MatchString(s):
		if err := c.value(s); err != nil {
			wrong = append(wrong, err.Error())
		}
	case dotted.MatchString(s):
		section, _, _ := strings.Cut(s, ".")
		if places := c.places(section); len(places) == 0 {
			break
		}
		if len(c.places(s)) == 0 {
			wrong = append(wrong, fmt.Sprintf("the configuration has no key %s", s))
		}
	}
	if dotted.MatchString(s) && number.MatchString(beside) {
		for _, p := range c.places(s) {
			if p.def != "" && strings.NewReplacer(",", "", " ", "").Replace(beside) != p.def {
				wrong = append(wrong, fmt.Sprintf("the default of %s is %s, not %s", s, p.def, beside))
			}
		}
	}
	return wrong
}

func (c *claims) hasFlag(name string) bool {
	return slices.ContainsFunc(c.commands, func(cmd *cobra.Command) bool {
		return cmd.Flags().Lookup(name) != nil
	})
}

// value judges `key: value`, wherever the configuration has such a key. Three dots stand for anything.
func (c *claims) value(s string) error {
	var m map[string]any
	if yaml.Unmarshal([]byte(s), &m) != nil {
		return nil // text with a colon in it
	}
	for key, v := range m {
		places := c.places(key)
		if len(places) == 0 {
			return fmt.Errorf("the configuration has no key %s: name one that it has; "+
				"in what belongs to another program put no space behind the colon", key)
		}
		var first error
		fits := slices.ContainsFunc(places, func(p place) bool {
			var err error
			if strings.Contains(s, "...") {
				err = keysOf(p.node, v)
			} else {
				err = validate(p.schema, v)
			}
			if first == nil {
				first = err
			}
			return err == nil
		})
		if !fits {
			return fmt.Errorf("`%s` is no valid configuration: %s", s, oneSpace(first.Error()))
		}
	}
	return nil
}

func validate(s *jsonschema.Schema, v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(string(text)))
	if err != nil {
		return err
	}
	if err := s.Validate(doc); err != nil {
		_, where, _ := strings.Cut(err.Error(), "\n") // behind the schema's address
		return errors.New(where)
	}
	return nil
}

// keysOf looks at the keys of a value alone.
func keysOf(node map[string]any, v any) error {
	m, ok := v.(map[string]any)
	if !ok {
		return nil
	}
	var props map[string]any
	var look func(map[string]any)
	look = func(n map[string]any) {
		if p, ok := n["properties"].(map[string]any); ok {
			props = p
		}
		either, _ := n["anyOf"].([]any)
		for _, sub := range either {
			look(sub.(map[string]any))
		}
		if items, ok := n["items"].(map[string]any); ok {
			look(items)
		}
	}
	look(node)
	for _, key := range slices.Sorted(maps.Keys(m)) {
		sub, ok := props[key].(map[string]any)
		if !ok {
			return fmt.Errorf("there is no key %s in it", key)
		}
		if err := keysOf(sub, m[key]); err != nil {
			return err
		}
	}
	return nil
}

// config loads a block that begins below line, with what a part of a configuration lacks in front of it.
func (c *claims) config(name, body string, line int) error {
	type part struct{ head, indent string }
	around := []part{{}}
	if !regexp.MustCompile(`(?m)^listeners:`).MatchString(body) {
		const target = "default: { forward: \"tailnet://home:443\" }\n"
		around = []part{{head: "listeners:\n- listen: [\":80\"]\n  mode: http\n  " + target}}
		for _, mode := range []string{"http", "https", "sni", "tcp"} {
			listener := "listeners:\n-\n"
			needs := []string{"listen: [\":80\"]", "mode: " + mode, "certificates: [{ tailscale: true }]"}
			for _, line := range needs {
				key, _, _ := strings.Cut(line, ":")
				has := regexp.MustCompile(`(?m)^` + key + `:`).MatchString(body)
				if !has && (key != "certificates" || mode == "https") {
					listener += "  " + line + "\n"
				}
			}
			around = append(around, part{listener, "  "}, part{listener + "  " + target, "  "},
				part{listener + "  routes:\n  -\n", "    "}, part{listener + "  default:\n", "    "})
		}
	}
	var best error
	for _, p := range around {
		text := body
		if p.indent != "" {
			text = p.indent + strings.ReplaceAll(strings.TrimRight(body, "\n"), "\n", "\n"+p.indent) + "\n"
		}
		// Empty lines above it give each error its line of the page.
		above := strings.Repeat("\n", max(0, line-strings.Count(p.head, "\n")))
		_, err := config.Parse(name, []byte(above+p.head+text))
		if err == nil {
			return nil
		}
		if best == nil || badness(err) < badness(best) {
			best = err
		}
	}
	partial := unknown(best) > 0 || strings.Contains(best.Error(), " is missing in ") ||
		strings.Contains(best.Error(), " must be a mapping ") // another section has a key of that name
	if len(around) > 1 && partial && c.value(body) == nil {
		return nil // some keys of a section
	}
	return fmt.Errorf("%w (mark a block that is for another program with ```yaml foreign)", best)
}

// badness compares the errors of a block in several places: first the keys that can't stand there.
func badness(err error) int { return 1000*unknown(err) + strings.Count(err.Error(), "\n") }

// unknown is how many keys stand where they can't.
func unknown(err error) int {
	return strings.Count(err.Error(), "unknown key") + strings.Count(err.Error(), "it belongs in")
}

var (
	words = regexp.MustCompile(`\d*[<>]+&?\d*|[|;&()]+|#.*|(?:"[^"]*"|'[^']*'|[^\s|;&()<>"'])+`)
	// commandLine is a line with those that go on from it.
	commandLine = regexp.MustCompile(`(?m)^(?:.*\\\n)*.*\n?`)

	operator  = regexp.MustCompile(`^(?:\d*[<>]|[|;&()])`)
	variable  = regexp.MustCompile(`^[A-Z_]+=`)
	runsOther = []string{"$", "sudo", "env", "nice", "exec", "time", "then", "do", "!"}
)

// shell judges lines for a shell; whole says that a command has all its arguments.
func (c *claims) shell(text string, whole bool) (wrong []string) {
	for line := range strings.Lines(strings.ReplaceAll(text, "\\\n", " ")) {
		var command []string
		judge := func() {
			isCommand := func(w string) bool {
				return !slices.Contains(runsOther, w) && !variable.MatchString(w)
			}
			command = command[max(0, slices.IndexFunc(command, isCommand)):]
			if len(command) > 3 && command[0] == "docker" && command[1] == "exec" {
				command = command[3:]
			}
			if len(command) > 1 {
				wrong = append(wrong, c.command(command, whole)...)
			}
			command = nil
		}
		for _, w := range words.FindAllString(line, -1) {
			switch {
			case strings.HasPrefix(w, "#"), operator.MatchString(w):
				judge()
			default:
				command = append(command, strings.Trim(w, `"'`))
			}
			if strings.HasPrefix(w, "#") {
				break
			}
		}
		judge()
	}
	return wrong
}

func (c *claims) command(w []string, whole bool) (wrong []string) {
	switch line := strings.Join(w, " "); path.Base(w[0]) {
	case "tailsplice":
		if err := c.parse(w[1:], whole); err != nil {
			wrong = append(wrong, fmt.Sprintf("%s: %v", line, err))
		}
	case "make":
		for _, word := range w[1:] {
			name, _, isVariable := strings.Cut(word, "=")
			switch {
			case strings.HasPrefix(word, "-"):
				return wrong
			case isVariable && !strings.Contains(c.makefile, "("+name):
				wrong = append(wrong, fmt.Sprintf("%s: the Makefile has no variable %s", line, name))
			case !isVariable && !strings.Contains(c.makefile, "\n"+name+":"):
				wrong = append(wrong, fmt.Sprintf("%s: the Makefile has no target %s", line, name))
			}
		}
	}
	return wrong
}

// find looks a command up by its first words.
func (c *claims) find(w []string) (cmd *cobra.Command, rest []string, ok bool) {
	cmd, rest, err := c.commands[0].Find(w)
	return cmd, rest, err == nil && cmd != c.commands[0]
}

func (c *claims) parse(w []string, whole bool) error {
	cmd, rest, ok := c.find(w)
	if !ok && !strings.HasPrefix(w[0], "-") {
		return fmt.Errorf("there is no command %s", w[0])
	}
	if cmd == nil {
		cmd, rest = c.commands[0], w
	}
	cmd.Flags().VisitAll(func(f *pflag.Flag) { f.Changed = false })
	if err := cmd.ParseFlags(rest); err != nil {
		return errors.New(oneSpace(err.Error()))
	}
	if !whole {
		return nil
	}
	if err := cmd.ValidateArgs(cmd.Flags().Args()); err != nil {
		return err
	}
	return cmd.ValidateRequiredFlags()
}

// link judges the address of a link in a page.
func (c *claims) link(name, text, to string) error {
	if strings.Contains(to, ":") {
		return nil // of another site
	}
	file, anchor, _ := strings.Cut(to, "#")
	if file != "" {
		at := filepath.Join(c.root, path.Dir(name), file)
		if _, err := os.Stat(at); err != nil {
			return fmt.Errorf("the link to %s is dead: there is no such file", to)
		}
		if anchor == "" {
			return nil
		}
		b, err := os.ReadFile(at)
		if err != nil {
			return err
		}
		text = string(b)
	}
	seen := map[string]int{}
	for _, m := range heading.FindAllStringSubmatch(fence.ReplaceAllStringFunc(text, blank), -1) {
		slug := notInSlug.ReplaceAllString(strings.ToLower(strings.TrimSpace(m[1])), "")
		slug = strings.ReplaceAll(slug, " ", "-")
		if n := seen[slug]; n > 0 {
			slug = fmt.Sprintf("%s-%d", slug, n)
		}
		seen[slug]++
		if slug == anchor {
			return nil
		}
	}
	if strings.Contains(text, `id="`+anchor+`"`) {
		return nil
	}
	return fmt.Errorf("the link to %s is dead: there is no heading for #%s", to, anchor)
}
