package reference

import (
	"encoding"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// Field is one of a JSON output, as a table of docs/reference/json.md has it.
type Field struct {
	Path string // flows[].id
	Type string // string, integer, number, boolean, time, object, or "array of" or "object of" one of them
	May  bool   // it may be absent
}

func (f Field) String() string {
	when := "always"
	if f.May {
		when = "optional"
	}
	return fmt.Sprintf("| `%s` | %s | %s |", f.Path, f.Type, when)
}

// Fields lists what encoding/json makes of a type.
func Fields(t reflect.Type) (fields []Field) {
	var walk func(t reflect.Type, path string)
	walk = func(t reflect.Type, path string) {
		for i := range t.NumField() {
			sf := t.Field(i)
			name, options, _ := strings.Cut(sf.Tag.Get("json"), ",")
			switch {
			case sf.Anonymous && name == "":
				walk(sf.Type, path)
				continue
			case name == "-" || !sf.IsExported():
				continue
			case name == "":
				name = sf.Name
			}
			f := Field{path + name, "", strings.Contains(options, "omit")}
			word, inner, below := typeOf(sf.Type)
			f.Type = word
			fields = append(fields, f)
			if inner != nil {
				walk(inner, f.Path+below)
			}
		}
	}
	prefix := ""
	if t.Kind() == reflect.Slice {
		t, prefix = t.Elem(), "[]."
	}
	walk(t, prefix)
	return fields
}

// typeOf is the word for a type, and the struct within it, whose fields stand below its path.
func typeOf(t reflect.Type) (word string, inner reflect.Type, below string) {
	switch {
	case t.Kind() == reflect.Pointer:
		return typeOf(t.Elem())
	case t == reflect.TypeFor[time.Time]():
		return "time", nil, ""
	case t.Implements(reflect.TypeFor[encoding.TextMarshaler]()):
		return "string", nil, ""
	}
	switch t.Kind() {
	case reflect.String:
		return "string", nil, ""
	case reflect.Bool:
		return "boolean", nil, ""
	case reflect.Float64, reflect.Float32:
		return "number", nil, ""
	case reflect.Struct:
		return "object", t, "."
	case reflect.Slice:
		word, inner, below = typeOf(t.Elem())
		return "array of " + word, inner, "[]" + below
	case reflect.Map:
		word, inner, below = typeOf(t.Elem())
		return "object of " + word, inner, ".*" + below
	}
	return "integer", nil, ""
}

// JSONPage is the page of JSON outputs, as a test in a folder two levels below the module's finds it.
const JSONPage = "../../docs/reference/json.md"

// CompareFields fails unless the table below a heading of JSONPage has exactly these fields.
func CompareFields(t *testing.T, heading string, fields []Field) {
	t.Helper()
	have := table(t, heading)
	for _, f := range fields {
		i := slices.IndexFunc(have, func(h Field) bool { return h.Path == f.Path })
		if i < 0 {
			t.Errorf("%s has a new field. Add this row, with its meaning, to the table %q of docs/reference/json.md:\n%s ? |",
				heading, heading, f)
			continue
		}
		if have[i] != f {
			t.Errorf("%s: a field changed, and scripts may read it:\nis   %s\nwas  %s\nLeave it as it was, or change the page "+
				"and raise format_version.", heading, f, have[i])
		}
		have = slices.Delete(have, i, i+1)
	}
	for _, f := range have {
		t.Errorf("%s: a field is gone, and scripts may read it:\n%s\nLeave it, or remove it from docs/reference/json.md "+
			"and raise format_version.", heading, f)
	}
}

var fieldRow = regexp.MustCompile("^\\| `([^`]+)` \\| ([a-z ]+) \\| (always|optional) \\| .+ \\|$")

// table reads the rows between a heading of the page and the next one.
func table(t *testing.T, heading string) (fields []Field) {
	t.Helper()
	_, section, ok := strings.Cut(pageText(t), "\n## "+heading+"\n")
	if !ok {
		t.Fatalf("docs/reference/json.md has no heading %q", heading)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	for line := range strings.SplitSeq(section, "\n") {
		if m := fieldRow.FindStringSubmatch(line); m != nil {
			fields = append(fields, Field{m[1], m[2], m[3] == "optional"})
		} else if strings.HasPrefix(line, "| `") {
			t.Errorf("docs/reference/json.md: a row is not of the form | `path` | type | always or optional | meaning |:\n%s", line)
		}
	}
	return fields
}

// CompareFormat fails unless the page names this format_version.
func CompareFormat(t *testing.T, version int) {
	t.Helper()
	if want := fmt.Sprintf("`format_version` is **%d**", version); !strings.Contains(pageText(t), want) {
		t.Errorf("docs/reference/json.md does not say that %s", want)
	}
}

func pageText(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(JSONPage)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// Keys lists the paths in the table below a heading of JSONPage.
func Keys(t *testing.T, heading string) (keys []string) {
	t.Helper()
	for _, f := range table(t, heading) {
		keys = append(keys, f.Path)
	}
	return keys
}
