package vhost

import (
	"reflect"
	"testing"

	"github.com/tailsplice/tailsplice/test/reference"
)

// TestJSONFields: the fields of error pages are those of docs/reference/json.md.
func TestJSONFields(t *testing.T) {
	reference.CompareFormat(t, formatVersion)
	reference.CompareFields(t, "Error pages", reference.Fields(reflect.TypeFor[errorPage]()))
}
