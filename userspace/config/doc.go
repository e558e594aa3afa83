// Package config reads tailsplice's YAML configuration.
//
// It is strict: every unknown key, wrong type, bad value and unreachable route is an error, all of them
// come at once, and each says FILE:LINE:COL, what is wrong, and the nearest right name. Anything that may
// be meant but looks like a mistake is a warning (Config.Warnings).
//
// The package only looks at the text. It resolves no name, opens no socket and reads no certificate, so a
// file can be checked on another machine than the one that runs it. Three things come from outside: the host
// name (the default of node), the folder of the file, which relative paths start from, and the environment
// variables that values name (expand.go).
//
// The struct tags of the types here are the only description of the format, and keys.yaml says in words what
// each key means. The decoder, the JSON schema (Schema) and the reference (docs/reference/configuration.md
// and tailsplice.yaml(5)) are made of them:
//
//	yaml:"key"        the key; ",inline" on an embedded struct means its keys stand beside
//	kind:"listen"     how a scalar is read, see kinds.go; the Go type decides when there is none
//	noun:"a route"    what an item or section is called in messages
//	short:"to"        the one key of a section that may be written without it: redirect: https
//	key:"header"      how the names of a mapping are read whose keys are free
//	default:"5s"      what an absent key means, in the form that a user would write
//	enum:"a b"        the values allowed
//	min:"" max:""     the bounds, inclusive, in the form that a user would write
//	required:"true"   an absent key is an error
//	nonempty:"true"   an empty list is an error
//
// Its files:
//
//	load.go       a file becomes a Config
//	expand.go     ${VAR} in values
//	tree.go       YAML becomes a tree with positions
//	colons.go     colons in values, where the YAML library splits too early
//	decode.go     the tree becomes a Config
//	kinds.go      how each kind of scalar is read
//	names.go      host names and patterns
//	target.go     targets
//	config.go     the format: all that is not in the next four
//	http.go       the format of HTTP routes
//	health.go     the format of balancing and health checks
//	access.go     the format of access rules and logs
//	docker.go     the format of labels
//	wake.go       the format of wake
//	walk.go       each listener, and each thing that it does
//	validate.go   what a Config must not contain
//	questions.go  forward_auth that asks its own listener
//	suggest.go    the nearest right name
//	errors.go     errors and warnings with positions
//	schema.go     the JSON schema, and what keys.yaml says about each key
package config
