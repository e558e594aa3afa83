package main

import (
	"reflect"
	"testing"

	"github.com/tailsplice/tailsplice/test/reference"
	"github.com/tailsplice/tailsplice/userspace/admin"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/server"
)

// TestJSONFields: the fields that scripts read are those of docs/reference/json.md, which is changed with care.
func TestJSONFields(t *testing.T) {
	reference.CompareFormat(t, flow.FormatVersion)
	for heading, typ := range map[string]reflect.Type{
		"status":                    reflect.TypeFor[server.Status](),
		"flows":                     reflect.TypeFor[[]flow.Snapshot](),
		"top":                       reflect.TypeFor[flow.Sample](),
		"trace":                     reflect.TypeFor[plan.Trace](),
		"doctor":                    reflect.TypeFor[report](),
		"init":                      reflect.TypeFor[started](),
		"target disable and enable": reflect.TypeFor[server.Disabled](),
		"log level":                 reflect.TypeFor[logLevel](),
		"flows kill":                reflect.TypeFor[server.Killed](),
		"drain and undrain":         reflect.TypeFor[server.Drained](),
		"version":                   reflect.TypeFor[built](),
		"/readyz":                   reflect.TypeFor[server.Readiness](),
		"/healthz":                  reflect.TypeFor[admin.Liveness](),
	} {
		t.Run(heading, func(t *testing.T) { reference.CompareFields(t, heading, reference.Fields(typ)) })
	}
}
