package config

import (
	"fmt"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/tailsplice/tailsplice/test/reference"
)

// TestReferenceIsCurrent compares docs/reference/configuration.md and tailsplice.yaml(5) with what these types and
// keys.yaml say.
func TestReferenceIsCurrent(t *testing.T) {
	const from = "userspace/config"
	docs := filepath.Join("..", "..", "docs")
	reference.Current(t, *update, filepath.Join(docs, "reference", "configuration.md"),
		referencePage().Markdown("Every key of the configuration", from))
	reference.Current(t, *update, filepath.Join(docs, "man", "tailsplice.yaml.5"),
		referencePage().ManPage("tailsplice.yaml", 5, "the configuration of tailsplice", from))
}

// part is a section of the format: a struct, and the paths of the keys that it is the value of.
type part struct {
	typ   reflect.Type
	paths []string
}

// parts lists the sections, each before those within it.
func parts() []part {
	var out []part
	var walk func(t reflect.Type, path string)
	walk = func(t reflect.Type, path string) {
		if t == reflect.TypeFor[Action]() {
			return // default has the keys of a route
		}
		if i := slices.IndexFunc(out, func(p part) bool { return p.typ == t }); i >= 0 {
			out[i].paths = append(out[i].paths, path)
			return
		}
		out = append(out, part{t, []string{path}})
		for _, f := range fieldsOf(t) {
			if f.kind == nil {
				walk(sectionOf(f.typ), below(path, f.key))
			}
		}
	}
	walk(reflect.TypeFor[Config](), "")
	return out
}

func sectionOf(t reflect.Type) reflect.Type {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice {
		t = t.Elem()
	}
	return t
}

func below(path, key string) string { return strings.TrimPrefix(path+"."+key, ".") }

// title is the heading of a section.
func (s part) title() string {
	if s.paths[0] == "" {
		return "At the top"
	}
	return "Section `" + strings.Join(s.paths, "`, `") + "`"
}

func referencePage() *reference.Page {
	p := &reference.Page{}
	p.Man("DESCRIPTION", "The file is YAML. It is read when the daemon starts and when it is told to reload. "+
		"Every key that is not listed here is an error, so that a typing mistake is not ignored.")
	p.Web("The file is YAML. Every key that is not listed here is an error. [The guide](../configuration.md) " +
		"explains variables,\naddresses and lists of denied clients; [examples](../../examples) show keys at work. " +
		"`tailsplice check --schema`\nprints the same as a JSON schema for editors, and `man tailsplice.yaml` shows this page.")
	p.Text("A list of one item can be written without brackets: `host: example.org`. `${NAME}` and `${NAME:-DEFAULT}` " +
		"in a value stand for an environment variable. A duration has its unit in the value (`500ms`, `5s`, `10m`, " +
		"`1h30m`), and so has a size (`64KiB`, `2MiB`, `1GiB`; a bare number is bytes).")
	p.Heading(1, "Example")
	p.Text("An edge, which sends all TLS connections on port 443 to the node `home` of the tailnet:")
	p.Code("yaml", "listeners:\n  - listen: [\":443\"]\n    mode: sni\n    default: { forward: tailnet://home:443 }")
	all := parts()
	var index strings.Builder
	for _, s := range all {
		fmt.Fprintf(&index, "- [%s](%s):", s.title(), reference.Anchor(s.title()))
		for i, f := range fieldsOf(s.typ) {
			sep := ","
			if i == 0 {
				sep = ""
			}
			fmt.Fprintf(&index, "%s\n  [%s](%s)", sep, f.key, reference.Anchor(below(s.paths[0], f.key)))
		}
		index.WriteString("\n")
	}
	p.Web("## Index\n\n" + strings.TrimRight(index.String(), "\n"))
	p.Heading(1, "Keys")
	p.Text("A section is named by the path of its key.")
	for _, s := range all {
		p.Heading(2, s.title())
		if note := partNotes[s.typ]; note != "" {
			p.Text(note)
		}
		for _, f := range fieldsOf(s.typ) {
			d := describe(f.home, f.key)
			p.Entry(3, below(s.paths[0], f.key), f.key, d.Doc, f.facts(d, all), "yaml", f.key+": "+d.Example)
		}
	}
	p.Man("FILES", "`/etc/tailsplice/tailsplice.yaml`, unless `--config` names another file.")
	p.Man("SEE ALSO", "`tailsplice(8)`, `tailsplice-check(8)`, `tailsplice-reload(8)`, "+
		"`/usr/share/doc/tailsplice/docs`, `/usr/share/doc/tailsplice/examples`")
	return p
}

// partNotes say what holds for several keys of a section.
var partNotes = map[reflect.Type]string{
	reflect.TypeFor[Route](): "A route has exactly one of `forward`, `reject` and `redirect`. `listeners.default` has " +
		"the same keys, without those that match: `sni`, `alpn`, `host`, `path`, `methods` and `headers`.",
	reflect.TypeFor[Certificate](): "An item has exactly one of these keys.",
	reflect.TypeFor[Deny]():        "An item has exactly one of these keys.",
	reflect.TypeFor[BasicAuth]():   "The section has exactly one of these keys.",
	reflect.TypeFor[ACME]():        "The section has `names`, `on_demand` or both.",
}

// facts are what the page says of a key beside its meaning: type, default, unit, bounds, needs.
func (f *field) facts(d described, all []part) []string {
	facts := []string{"Type: " + f.typeText(all)}
	switch {
	case f.required:
		facts = append(facts, "Required")
	case f.def != "":
		facts = append(facts, "Default: `"+f.def+"`")
	case d.Default != "":
		facts = append(facts, "Default: "+d.Default)
	case f.kind == nil && f.typ.Kind() == reflect.Struct:
		facts = append(facts, "Default: those of its keys")
	case f.kind == kinds["true"]:
		facts = append(facts, "Default: off")
	default:
		facts = append(facts, "Default: none")
	}
	if f.min != "" {
		facts = append(facts, "Range: `"+f.min+"` to `"+f.max+"`")
	}
	if unit := f.unit(d); unit != "" {
		facts = append(facts, "Unit: "+unit)
	}
	if d.Needs != "" {
		facts = append(facts, "Needs: "+d.Needs)
	}
	if d.See != "" {
		to := "../" + d.See + ".md"
		if page, here := strings.CutPrefix(d.See, "reference/"); here {
			to = page + ".md"
		}
		facts = append(facts, "See: [docs/"+d.See+".md]("+to+")")
	}
	return facts
}

func (f *field) typeText(all []part) string {
	one := ""
	if f.kind == nil {
		t := sectionOf(f.typ)
		if t == reflect.TypeFor[Action]() {
			t = reflect.TypeFor[Route]()
		}
		for _, s := range all {
			if s.typ == t {
				one = "a mapping, see [" + strings.ToLower(s.title()[:1]) + s.title()[1:] + "](" + reference.Anchor(s.title()) + ")"
			}
		}
		if f.short != "" {
			one += ", or the value of its `" + f.short + "`"
		}
		if f.typ.Kind() == reflect.Slice {
			return "a list; each item is " + one
		}
		return one
	}
	switch {
	case len(f.enum) > 0:
		one = "`" + strings.Join(f.enum, "`, `") + "`"
		if len(f.enum) > 1 {
			one = "one of " + one
		}
	default:
		one = f.kind.noun
	}
	switch {
	case f.names != nil:
		return "a mapping from " + f.names.noun + " to " + one
	case f.typ.Kind() == reflect.Slice:
		return "a list of values; each is " + one
	}
	return one
}

// unit is how a number of the key is counted, "" where it has none.
func (f *field) unit(d described) string {
	switch f.kind {
	case kinds["duration"]:
		return "in the value: `ms`, `s`, `m` or `h`"
	case kinds["age"]:
		return "in the value: `s`, `m`, `h`, `d` or `y`"
	case kinds["size"]:
		return "bytes, or in the value: `KiB`, `MiB` or `GiB`"
	case kinds["rate"]:
		return "in the value: `/s`, `/m` or `/h`"
	}
	return d.Unit
}

// TestKeysDescribed: keys.yaml has every key there is and no other, and each example is a value that the key takes.
func TestKeysDescribed(t *testing.T) {
	keys := 0
	seen := map[string]bool{}
	for _, s := range parts() {
		for _, f := range fieldsOf(s.typ) {
			keys++
			name := f.home.Name() + "." + f.key
			seen[name] = true
			d := describe(f.home, f.key)
			if len(d.Doc) < 20 || !strings.HasSuffix(d.Doc, ".") || d.Example == "" {
				t.Errorf("%s: say in keys.yaml, under %s, what it is for (doc) and give an example", name, f.home.Name())
				continue
			}
			r := &reporter{file: "example"}
			n := parseTree(r, []byte(f.key+": "+d.Example))
			if len(r.errs) == 0 {
				dec := decoder{reporter: r, fields: map[reflect.Type][]field{}}
				dec.value(n.entries[0], &f, reflect.New(f.typ).Elem(), &Section{})
			}
			if len(r.errs) > 0 {
				t.Errorf("%s: the example in keys.yaml: %v", name, Errors(r.errs))
			}
			if d.Default != "" && (f.def != "" || f.required) {
				t.Errorf("%s: keys.yaml says a default, and the struct's tag says another thing", name)
			}
		}
	}
	for typ, section := range descriptions() {
		for key := range section {
			if !seen[typ+"."+key] {
				t.Errorf("keys.yaml describes %s.%s, and there is no such key", typ, key)
			}
		}
	}
	if keys < 100 {
		t.Errorf("only %d keys were seen", keys)
	}
}
