package config

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
)

// TestSchemaIsCurrent compares the committed schema with the one of these types.
func TestSchemaIsCurrent(t *testing.T) {
	if *update {
		if err := os.WriteFile("schema.json", Schema(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile("schema.json")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(have, Schema()) {
		t.Error("schema.json is not that of the types: run go generate ./userspace/config")
	}
}

func compileSchema(t testing.TB) *jsonschema.Schema {
	t.Helper()
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(Schema()))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("schema.json", doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile("schema.json") // checks it against draft 7's own schema
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// plain turns a file into what a JSON schema is checked against, or fails where it is no plain YAML.
func plain(t testing.TB, yaml []byte) any {
	t.Helper()
	r := &reporter{file: "file"}
	root := parseTree(r, yaml)
	if len(r.errs) > 0 {
		t.Fatal(Errors(r.errs))
	}
	var conv func(n *node) any
	conv = func(n *node) any {
		switch n.kind {
		case kindMapping:
			m := map[string]any{}
			for _, e := range n.entries {
				m[e.key] = conv(e.value)
			}
			return m
		case kindList:
			l := []any{}
			for _, item := range n.items {
				l = append(l, conv(item))
			}
			return l
		case kindNumber:
			if i, err := strconv.ParseInt(n.text, 10, 64); err == nil {
				return i
			}
			if f, err := strconv.ParseFloat(n.text, 64); err == nil {
				return f
			}
			return n.text // .inf and the like are no JSON
		case kindBool:
			return n.text == "true"
		case kindNull:
			return nil
		}
		return n.text
	}
	return conv(root)
}

// TestSchemaAgrees checks that the schema and the decoder refuse the same shapes and accept the same files.
func TestSchemaAgrees(t *testing.T) {
	schema := compileSchema(t)
	for _, g := range goldens(t, "structure", nil) {
		t.Run("refuse/"+g.name, func(t *testing.T) {
			if g.name == "unknown-key-not-text" {
				g.yaml, _, _ = bytes.Cut(g.yaml, []byte("? ")) // the rest is no JSON
			}
			if _, err := Parse(g.name, g.yaml); err == nil {
				t.Error("Parse accepts it")
			}
			if err := schema.Validate(plain(t, g.yaml)); err == nil {
				t.Error("the schema accepts it")
			}
		})
	}
	for _, g := range goldens(t, "warnings", nil) {
		t.Run("accept/"+g.name, func(t *testing.T) {
			if err := schema.Validate(plain(t, g.yaml)); err != nil {
				t.Errorf("the schema refuses it: %v", err)
			}
		})
	}
	for _, file := range validFiles(t) {
		t.Run("accept/"+filepath.Base(file), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := Parse(file, data); err != nil {
				t.Errorf("Parse refuses it: %v", err)
			}
			if err := schema.Validate(plain(t, data)); err != nil {
				t.Errorf("the schema refuses it: %v", err)
			}
		})
	}
}

// TestSchemaRefusesEachUnknownKey adds a key that nobody knows to every mapping of a full file, one at a
// time: neither the schema nor the decoder may have an open section. The same for values of a wrong type.
func TestSchemaRefusesEachUnknownKey(t *testing.T) {
	schema := compileSchema(t)
	data, err := os.ReadFile(filepath.Join("testdata", "valid", "everything.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	root := plain(t, data)
	type change struct {
		what string
		text []byte
	}
	changes := make(chan change)
	var all sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		all.Go(func() {
			for c := range changes {
				if _, err := Parse("changed.yaml", c.text); err == nil {
					t.Errorf("%s: Parse accepts it", c.what)
				}
				doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(c.text))
				if err != nil {
					t.Errorf("%s: %v", c.what, err)
				} else if err := schema.Validate(doc); err == nil {
					t.Errorf("%s: the schema accepts it", c.what)
				}
			}
		})
	}
	refused := 0
	both := func(what string) {
		t.Helper()
		refused++
		// JSON is YAML.
		text, err := json.Marshal(root)
		if err != nil {
			t.Fatal(err)
		}
		changes <- change{what, text}
	}
	var walk func(v any, path string)
	walk = func(v any, path string) {
		switch v := v.(type) {
		case map[string]any:
			v["nobody_knows"] = "x"
			both(path + ".nobody_knows")
			delete(v, "nobody_knows")
			for key, old := range v {
				for _, wrong := range []any{nil, map[string]any{"x": "y"}, []any{[]any{}}, false, -0.5} {
					if _, either := old.(bool); either && wrong == false {
						continue // a value, of the right type
					}
					if _, isMap := wrong.(map[string]any); isMap && (key == "headers" || key == "set") {
						continue // the names of headers are free
					}
					v[key] = wrong
					both(path + "." + key)
				}
				v[key] = old
				walk(old, path+"."+key)
			}
		case []any:
			for i, old := range v {
				for _, wrong := range []any{nil, []any{}, false, -0.5} {
					v[i] = wrong
					both(path + "." + strconv.Itoa(i))
				}
				v[i] = old
				walk(old, path+"."+strconv.Itoa(i))
			}
		}
	}
	walk(root, "")
	close(changes)
	all.Wait()
	text, err := json.Marshal(root)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Parse("unchanged.yaml", text); err != nil {
		t.Errorf("the file that was changed back: %v", err)
	}
	if refused < 200 {
		t.Errorf("only %d changes were tried", refused)
	}
}

// TestSchemaDescribes checks that every key has a description, for editors to show.
func TestSchemaDescribes(t *testing.T) {
	var schema map[string]any
	if err := json.Unmarshal(Schema(), &schema); err != nil {
		t.Fatal(err)
	}
	keys := 0
	var walk func(v any, path string)
	walk = func(v any, path string) {
		m, ok := v.(map[string]any)
		if !ok {
			return
		}
		if m["additionalProperties"] == false {
			for key, p := range m["properties"].(map[string]any) {
				keys++
				if d, _ := p.(map[string]any)["description"].(string); len(d) < 10 {
					t.Errorf("%s.%s has no description", path, key)
				}
				walk(p, path+"."+key)
			}
		}
		walk(m["items"], path)
	}
	walk(schema, "")
	if keys < 40 {
		t.Errorf("only %d keys were seen", keys)
	}
}
