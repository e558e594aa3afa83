package config

import (
	_ "embed"
	"reflect"
	"strings"
	"sync"

	"github.com/goccy/go-yaml"
)

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
