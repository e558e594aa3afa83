package accesslog

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/reference"
)

// TestJSONFields: the fields of a line are those of docs/reference/json.md.
func TestJSONFields(t *testing.T) {
	reference.CompareFormat(t, formatVersion)
	all := entry
	all.Err = "it failed"
	full, least := decode(t, &all), decode(t, &Entry{})
	var fields []reference.Field
	for key, value := range full {
		f := reference.Field{Path: key, Type: "string"}
		_, always := least[key]
		f.May = !always
		switch v := value.(type) {
		case json.Number:
			f.Type = "integer"
			if strings.Contains(v.String(), ".") {
				f.Type = "number"
			}
		case string:
			if _, err := time.Parse(time.RFC3339Nano, v); err == nil {
				f.Type = "time"
			}
		}
		fields = append(fields, f)
	}
	slices.SortFunc(fields, func(a, b reference.Field) int { return strings.Compare(a.Path, b.Path) })
	reference.CompareFields(t, "Access log", fields)
}

func decode(t *testing.T, e *Entry) (line map[string]any) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(appendJSON(nil, e)))
	d.UseNumber()
	if err := d.Decode(&line); err != nil {
		t.Fatal(err)
	}
	return line
}
