package config

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"

	"github.com/goccy/go-yaml"
)

// Schema returns a JSON schema (draft 7, which editors know best) of the configuration, generated from the
// types here. It allows everything that Parse accepts; what it cannot say, such as unreachable routes, only
// Parse refuses. The same text is committed as schema.json.
func Schema() []byte {
	s := sectionSchema(reflect.TypeFor[Config]())
	s["$schema"] = "http://json-schema.org/draft-07/schema#"
	s["title"] = "tailsplice configuration"
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(s); err != nil {
		panic(err) // only maps, slices and strings are in it
	}
	return b.Bytes()
}

func sectionSchema(t reflect.Type) map[string]any {
	props := map[string]any{}
	var required []string
	for _, f := range fieldsOf(t) {
		props[f.key] = f.schema()
		if f.required {
			required = append(required, f.key)
		}
	}
	s := map[string]any{"type": "object", "additionalProperties": false, "properties": props}
	if len(required) > 0 {
		s["required"] = required
	}
	maps.Copy(s, rules(t))
	return s
}

// rules are what the schema says about the keys of a section together; validator says the same in words.
func rules(t reflect.Type) map[string]any {
	need := func(keys ...string) map[string]any { return map[string]any{"required": keys} }
	no := func(keys ...string) map[string]any {
		var each []any
		for _, k := range keys {
			each = append(each, need(k))
		}
		return map[string]any{"not": map[string]any{"anyOf": each}}
	}
	obj := func(parts ...map[string]any) map[string]any {
		all := map[string]any{}
		for _, p := range parts {
			maps.Copy(all, p)
		}
		return all
	}
	when := func(then map[string]any, modes ...string) map[string]any {
		return map[string]any{
			"if":   obj(need("mode"), map[string]any{"properties": map[string]any{"mode": map[string]any{"enum": modes}}}),
			"then": then,
		}
	}
	routes := func(rule map[string]any) map[string]any {
		return map[string]any{"properties": map[string]any{"routes": map[string]any{"items": rule}}}
	}
	switch t {
	case reflect.TypeFor[Action](), reflect.TypeFor[Route]():
		return map[string]any{"oneOf": []any{
			need("forward"),
			obj(need("reject"), no(slices.Concat(httpKeys, proxyKeys, accessKeys, balanceKeys)...)),
			obj(need("redirect"), no(slices.Concat(forwardKeys, proxyKeys, balanceKeys)...)),
		}}
	case reflect.TypeFor[BasicAuth](), reflect.TypeFor[Deny](), reflect.TypeFor[Certificate]():
		return map[string]any{"minProperties": 1, "maxProperties": 1}
	case reflect.TypeFor[ACME]():
		return map[string]any{"anyOf": []any{need("names"), need("on_demand")}}
	case reflect.TypeFor[Listener]():
		return map[string]any{"allOf": []any{
			when(obj(need("default"), no("routes", "docker")), "tcp"),
			when(map[string]any{"anyOf": []any{need("default"), need("routes"), need("docker")}}, "sni", "http", "https"),
			when(obj(map[string]any{"properties": map[string]any{
				"routes":  map[string]any{"items": obj(need("sni"), no(slices.Concat([]string{"host", "path", "methods", "headers"}, httpKeys, httpAccessKeys)...))},
				"default": no(httpAccessKeys...)}}), "sni"),
			when(routes(obj(need("host"), no("sni", "alpn"))), "http", "https"),
			when(map[string]any{"properties": map[string]any{"default": no(httpKeys...)}}, "sni", "tcp"),
			when(need("certificates"), "https"),
			when(no("certificates", "hsts"), "sni", "tcp", "http"),
			when(no("server_timing", "access_log"), "sni", "tcp"),
			when(map[string]any{"properties": map[string]any{"default": no(httpAccessKeys...)}}, "tcp"),
		}}
	}
	return nil
}

func (f *field) schema() map[string]any {
	if f.kind == nil {
		return f.sectionSchema()
	}
	item := maps.Clone(f.kind.schema)
	if len(f.enum) > 0 {
		item["enum"] = f.enum
	}
	if f.min != "" && takesInteger(item) {
		// Bounds only bind numbers, so they may stand beside text such as 2MiB.
		item["minimum"], item["maximum"] = f.number(f.min), f.number(f.max)
	}
	item = orVariable(item)
	s := item
	if f.names != nil {
		s = map[string]any{"type": "object", "propertyNames": f.names.schema, "additionalProperties": item}
		if f.nonempty {
			s["minProperties"] = 1
		}
	} else if f.typ.Kind() == reflect.Slice {
		list := f.listSchema(item)
		if !f.repeats {
			list["uniqueItems"] = true
		}
		s = map[string]any{"anyOf": []any{list, item}}
	}
	s["description"] = describe(f.home, f.key).Doc
	if f.def != "" {
		s["default"] = f.def
		if takesInteger(f.kind.schema) && decimal.MatchString(f.def) {
			s["default"] = f.number(f.def)
		}
	}
	return s
}

func (f *field) sectionSchema() map[string]any {
	s := sectionSchema(deref(f.typ))
	var short map[string]any
	if f.short != "" {
		short = s["properties"].(map[string]any)[f.short].(map[string]any)
		s = map[string]any{"anyOf": []any{short, s}}
	}
	if f.typ.Kind() == reflect.Slice {
		s = f.listSchema(s)
		if short != nil {
			s = map[string]any{"anyOf": []any{short, s}}
		}
	}
	s["description"] = describe(f.home, f.key).Doc
	return s
}

func (f *field) listSchema(item map[string]any) map[string]any {
	list := map[string]any{"type": "array", "items": item}
	if f.nonempty {
		list["minItems"] = 1
	}
	return list
}

// orVariable takes a text with a variable in it too, whatever s says.
func orVariable(s map[string]any) map[string]any {
	const has = `\$\{`
	pattern, matched := s["pattern"].(string)
	_, listed := s["enum"]
	switch {
	case s["type"] == "string" && matched && !listed:
		s["pattern"] = pattern + "|" + has
	case s["type"] != "string" || listed:
		return map[string]any{"anyOf": []any{s, text(has)}}
	}
	return s
}

func takesInteger(s map[string]any) bool {
	types, _ := s["type"].([]string)
	return s["type"] == "integer" || slices.Contains(types, "integer")
}

// described is what keys.yaml says of one key. Its comment says what the fields are.
type described struct {
	Doc     string `yaml:"doc"`
	Example string `yaml:"example"`
	Needs   string `yaml:"needs"`
	Unit    string `yaml:"unit"`
	Default string `yaml:"default"`
	See     string `yaml:"see"`
}

//go:embed keys.yaml
var keysYAML []byte

// descriptions is keys.yaml: by the Go type of the section, and the key.
var descriptions = sync.OnceValue(func() map[string]map[string]described {
	var all map[string]map[string]described
	if err := yaml.UnmarshalWithOptions(keysYAML, &all, yaml.DisallowUnknownField()); err != nil {
		panic(err) // it is a part of the program
	}
	for _, keys := range all {
		for name, d := range keys {
			for _, text := range []*string{&d.Doc, &d.Example, &d.Needs} {
				*text = strings.Join(strings.Fields(*text), " ")
			}
			keys[name] = d
		}
	}
	return all
})

// describe says what a key means whose field stands in the struct t.
func describe(t reflect.Type, key string) described { return descriptions()[t.Name()][key] }
