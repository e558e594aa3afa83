package config

import (
	"cmp"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"unicode"

	"github.com/tailsplice/tailsplice/userspace/spelling"
)

// field is one key of a section, as its struct field's tags describe it.
type field struct {
	key      string
	index    []int // for reflect.Value.FieldByIndex
	typ      reflect.Type
	kind     *kind        // of a scalar, or of the items of a list or mapping of scalars; nil for sections
	names    *kind        // of a mapping's keys
	short    string       // of a section: its one key that may be written without it
	home     reflect.Type // the struct that it is a field of
	noun     string
	def      string
	enum     []string
	min, max string
	required bool
	nonempty bool
	repeats  bool // a list that may have an item twice
}

// fieldsOf lists the keys of a section, those of embedded structs included.
func fieldsOf(t reflect.Type) []field {
	var fields []field
	for i := range t.NumField() {
		sf := t.Field(i)
		key, opt, _ := strings.Cut(sf.Tag.Get("yaml"), ",")
		if opt == "inline" {
			for _, f := range fieldsOf(sf.Type) {
				f.index = append([]int{i}, f.index...)
				fields = append(fields, f)
			}
			continue
		}
		if key == "" || key == "-" {
			continue
		}
		f := field{
			key: key, index: []int{i}, typ: sf.Type, home: t,
			noun: sf.Tag.Get("noun"), def: sf.Tag.Get("default"),
			enum: strings.Fields(sf.Tag.Get("enum")), min: sf.Tag.Get("min"), max: sf.Tag.Get("max"),
			required: sf.Tag.Get("required") == "true", nonempty: sf.Tag.Get("nonempty") == "true",
			repeats: sf.Tag.Get("repeats") == "true", short: sf.Tag.Get("short"),
		}
		if key := sf.Tag.Get("key"); key != "" {
			f.names = kinds[key]
		}
		if !isSection(f.typ) {
			f.kind = kindOf(sf)
		}
		if f.noun == "" {
			f.noun = key
		}
		fields = append(fields, f)
	}
	return fields
}

// isSection reports whether values of t (or its items) are mappings with keys of their own.
func isSection(t reflect.Type) bool {
	return deref(t).Kind() == reflect.Struct && deref(t) != targetType
}

// decoder fills the structs from the tree, and reports all that does not fit.
type decoder struct {
	*reporter
	fields map[reflect.Type][]field
}

func (d *decoder) fieldsOf(t reflect.Type) []field {
	f, ok := d.fields[t]
	if !ok {
		f = fieldsOf(t)
		d.fields[t] = f
	}
	return f
}

func (d *decoder) root(n *node, c *Config) {
	switch n.kind {
	case kindMapping:
		d.section(n, reflect.ValueOf(c).Elem(), "the configuration")
	case kindUnclear:
	case kindNull:
		d.errorf(n.pos, "the file is empty: it needs at least listeners, with listen, mode and a target")
	default:
		d.errorf(n.pos, "the configuration must be a mapping with keys such as listeners:, not %v", n.kind)
	}
}

// section fills a struct from a mapping.
func (d *decoder) section(n *node, out reflect.Value, noun string) {
	sec := out.FieldByName("Section").Addr().Interface().(*Section)
	sec.Pos = n.pos
	fields := d.fieldsOf(out.Type())
	var unknown []entry
	for _, e := range n.entries {
		i := slices.IndexFunc(fields, func(f field) bool { return f.key == e.key })
		if i < 0 {
			unknown = append(unknown, e)
			continue
		}
		f := &fields[i]
		if first := sec.find(f.key, -1); first != nil {
			d.errorf(e.pos, "duplicate key %q, it is already on line %d", f.key, first.keyPos.Line)
			continue
		}
		at := len(sec.places)
		sec.places = append(sec.places, place{key: f.key, index: -1, pos: e.value.pos, keyPos: e.pos})
		if !d.value(e, f, out.FieldByIndex(f.index), sec) {
			sec.places[at].unclear = true
		}
	}
	for _, e := range unknown {
		d.unknownKey(e, sec, fields, noun)
	}
	for i := range fields {
		f := &fields[i]
		if sec.has(f.key) {
			continue
		}
		if f.required {
			d.errorf(sec.Pos, "%s is missing in %s: %s", f.key, noun, f.want())
		}
		d.setDefault(f, out.FieldByIndex(f.index))
	}
}

// setDefault gives an absent key its value. A default that does not parse is our own mistake.
func (d *decoder) setDefault(f *field, out reflect.Value) {
	if f.def != "" {
		v, err := f.parse(&node{kind: kindText, text: f.def})
		if err != nil {
			panic(fmt.Sprintf("default of %s: %v", f.key, err))
		}
		set(out, v)
		return
	}
	if f.typ.Kind() == reflect.Struct && isSection(f.typ) {
		for _, inner := range d.fieldsOf(f.typ) {
			d.setDefault(&inner, out.FieldByIndex(inner.index))
		}
	}
}

// value fills one field, and reports whether all of the value was understood.
func (d *decoder) value(e entry, f *field, out reflect.Value, sec *Section) bool {
	n := e.value
	switch {
	case n.kind == kindUnclear:
		return false
	case n.kind == kindNull:
		return d.errorf(e.pos, "%s has no value: give it %s, or remove the key", f.key, f.want())
	case f.kind != nil && out.Kind() == reflect.Slice:
		return d.scalars(n, f, out, sec)
	case f.names != nil:
		return d.named(n, f, out, sec)
	case f.kind != nil:
		return d.scalar(n, f, out)
	case out.Kind() == reflect.Slice:
		return d.sections(n, f, out)
	}
	if n.kind != kindMapping && (f.short == "" || !n.isScalar()) {
		return d.wrongType(n, f)
	}
	if out.Kind() == reflect.Pointer {
		out.Set(reflect.New(out.Type().Elem()))
		out = out.Elem()
	}
	return d.oneSection(n, f, out)
}

// oneSection fills a struct from a mapping, or from the scalar that may stand for it.
func (d *decoder) oneSection(n *node, f *field, out reflect.Value) bool {
	if n.isScalar() {
		return d.short(n, f, out)
	}
	before := len(d.errs)
	d.section(n, out, f.noun)
	return len(d.errs) == before
}

// short fills a section of which only the one key is written that may stand for it.
func (d *decoder) short(n *node, f *field, out reflect.Value) bool {
	sec := out.FieldByName("Section").Addr().Interface().(*Section)
	sec.Pos = n.pos
	ok := true
	for _, inner := range d.fieldsOf(out.Type()) {
		v := out.FieldByIndex(inner.index)
		if inner.key != f.short {
			d.setDefault(&inner, v)
			continue
		}
		inner.key = f.key // as messages call it
		ok = d.scalar(n, &inner, v)
		sec.places = append(sec.places, place{key: f.short, index: -1, pos: n.pos, keyPos: n.pos, unclear: !ok})
	}
	return ok
}

// named fills a map from a mapping whose keys are free.
func (d *decoder) named(n *node, f *field, out reflect.Value, sec *Section) bool {
	if n.kind != kindMapping {
		return d.wrongType(n, f)
	}
	if f.nonempty && len(n.entries) == 0 {
		return d.errorf(n.pos, "%s is empty: %s", f.key, f.want())
	}
	ok := true
	lines := map[any]int{}
	out.Set(reflect.MakeMap(out.Type()))
	for _, e := range n.entries {
		ok = d.namedValue(e, f, out, lines) && ok
	}
	return ok
}

// namedValue adds one entry to a map. lines has the line of each name that the map has already.
func (d *decoder) namedValue(e entry, f *field, out reflect.Value, lines map[any]int) bool {
	if strings.ContainsFunc(e.key, unicode.IsControl) {
		return d.errorf(e.pos, "%s %q: there is a line break or another control character in it", f.key, clipKey(e.key))
	}
	name, err := f.names.parse(e.key)
	if err != nil {
		return d.errorf(e.pos, "%s %q: %v", f.key, clipKey(e.key), err)
	}
	if line := lines[name]; line > 0 {
		return d.errorf(e.pos, "%s has %q twice, it is already on line %d", f.key, name, line)
	}
	lines[name] = e.pos.Line
	inner := *f
	inner.key, inner.names = f.key+": "+name.(string), nil
	if e.value.kind == kindNull {
		return d.errorf(e.pos, "%s has no value: give it %s, or remove it", inner.key, f.kind.noun)
	}
	v := reflect.New(out.Type().Elem()).Elem()
	ok := d.scalar(e.value, &inner, v)
	if ok {
		out.SetMapIndex(reflect.ValueOf(name), v)
	}
	return ok
}

// sections fills a list of pointers to structs. Items that are no mappings are left out.
func (d *decoder) sections(n *node, f *field, out reflect.Value) bool {
	items := n.items
	switch {
	case f.short != "" && n.isScalar():
		items = []*node{n}
	case n.kind != kindList:
		return d.wrongType(n, f)
	case f.nonempty && len(n.items) == 0:
		return d.errorf(n.pos, "%s is an empty list: %s", f.key, f.want())
	}
	ok := true
	out.Set(reflect.MakeSlice(out.Type(), 0, len(items)))
	for _, item := range items {
		switch {
		case f.short != "" && item.isScalar(), item.kind == kindMapping:
			v := reflect.New(deref(out.Type()))
			ok = d.oneSection(item, f, v.Elem()) && ok
			out.Set(reflect.Append(out, v))
		case item.kind == kindNull:
			ok = d.errorf(item.pos, "an item of %s has no value: remove its dash, or write %s behind it", f.key, f.noun)
		case item.kind == kindUnclear:
			ok = false
		default:
			ok = d.errorf(item.pos, "%s must be a mapping with keys, not %v", f.noun, item.kind)
		}
	}
	return ok
}

// scalars fills a list of scalars, from a list or from a single scalar. Items that are wrong are left out.
func (d *decoder) scalars(n *node, f *field, out reflect.Value, sec *Section) bool {
	items := n.items
	if n.kind != kindList {
		items = []*node{n}
	} else if f.nonempty && len(items) == 0 {
		return d.errorf(n.pos, "%s is an empty list: %s", f.key, f.want())
	}
	ok := true
	seen := map[any]int{}
	for _, item := range items {
		v := reflect.New(out.Type().Elem()).Elem()
		if item.kind == kindNull {
			ok = d.errorf(item.pos, "an item of %s has no value: %s", f.key, f.want())
			continue
		}
		if !d.scalar(item, f, v) {
			ok = false
			continue
		}
		if line, dup := seen[v.Interface()]; dup && !f.repeats {
			ok = d.errorf(item.pos, "%s has %q twice, it is already on line %d", f.key, item.shown(), line)
			continue
		}
		seen[v.Interface()] = item.pos.Line
		sec.places = append(sec.places, place{key: f.key, index: out.Len(), pos: item.pos, keyPos: item.pos})
		out.Set(reflect.Append(out, v))
	}
	return ok
}

func (d *decoder) scalar(n *node, f *field, out reflect.Value) bool {
	if n.kind == kindUnclear {
		return false
	}
	n = n.typed(f.kind)
	if !f.kind.takes(n.kind) {
		return d.wrongType(n, f)
	}
	control := strings.ContainsFunc(n.text, unicode.IsControl)
	v, err := f.parse(n)
	err = cmp.Or(
		// its lines are not what is wrong with it
		refuse(control && f.kind == kinds["file"] && isKey(n.text), notTheKey),
		refuse(control, "there is a line break or another control character in it"),
		err)
	switch {
	case err == nil:
		set(out, v)
		return true
	case f.kind.secret:
		return d.errorf(n.pos, "%s: %v", f.key, err)
	}
	return d.errorf(n.pos, "%s %q: %v", f.key, clip(n.shown()), err)
}

// shown is what messages may show of a scalar: never the value of a variable.
func (n *node) shown() string {
	if n.written != "" {
		return n.written
	}
	return n.text
}

// typed is n as a kind takes it: what a variable gives is text, and may stand for a number, or for true or
// false.
func (n *node) typed(k *kind) *node {
	if n.written == "" || k.takes(n.kind) {
		return n
	}
	as := *n
	switch {
	case digits.MatchString(n.text):
		as.kind = kindNumber
	case n.text == "true" || n.text == "false":
		as.kind = kindBool
	}
	if !k.takes(as.kind) {
		return n
	}
	return &as
}

// parse reads a scalar and checks it against the field's values and bounds.
func (f *field) parse(n *node) (any, error) {
	if len(f.enum) > 0 && !slices.Contains(f.enum, n.text) {
		if len(f.enum) == 1 {
			return nil, fmt.Errorf("the only value is %s", f.enum[0])
		}
		return nil, fmt.Errorf("must be one of %s%s", strings.Join(f.enum, ", "), didYouMean(n.text, f.enum))
	}
	v, err := f.kind.parse(n.text)
	switch {
	case err != nil && n.written != "": // the error may tell a secret that came to the wrong place
		return nil, fmt.Errorf("with its variables replaced it is not %s", f.want())
	case err != nil:
		return nil, err
	}
	if i, ok := v.(int64); ok && f.min != "" {
		return v, refuse(i < f.number(f.min) || i > f.number(f.max), "out of range: %s to %s", f.min, f.max)
	}
	return v, nil
}

// number reads a bound or a default of the field's own kind.
func (f *field) number(s string) int64 {
	v, err := f.kind.parse(s)
	if err != nil {
		panic("bound of " + f.key + ": " + err.Error())
	}
	return v.(int64)
}

// set stores what a kind's parse returned: int64 for every number, duration and size.
func set(out reflect.Value, v any) {
	if i, ok := v.(int64); ok {
		out.SetInt(i)
		return
	}
	out.Set(reflect.ValueOf(v))
}

// want says what a key's value looks like.
func (f *field) want() string {
	switch {
	case f.names != nil:
		return "a mapping of " + f.names.noun + " to " + f.kind.noun
	case f.short != "":
		fields := fieldsOf(deref(f.typ))
		return fields[slices.Index(keysOf(fields), f.short)].want()
	case f.kind == nil && f.typ.Kind() == reflect.Slice:
		return "a list with " + f.noun + " behind each dash"
	case f.kind == nil:
		return "a mapping with the keys " + strings.Join(keysOf(fieldsOf(deref(f.typ))), ", ")
	case len(f.enum) == 1:
		return f.enum[0]
	case len(f.enum) > 1:
		return "one of " + strings.Join(f.enum, ", ")
	}
	return f.kind.noun
}

// wrongType reports a value of the wrong type. It returns false, as errorf does.
func (d *decoder) wrongType(n *node, f *field) bool {
	help := f.sectionAdvice(n)
	if f.kind != nil {
		help = f.scalarAdvice(n)
	}
	return d.errorf(n.pos, "%s must be %s, not %v%s", f.key, f.want(), n.kind, help)
}

// scalarAdvice says what to write where n stands in the place of a scalar.
func (f *field) scalarAdvice(n *node) string {
	switch {
	case (n.kind == kindNumber || n.kind == kindBool) && f.kind.instead != nil && len(f.enum) == 0:
		s := f.kind.instead(n.text)
		if s != "" && f.kind.secret {
			s = "it in quotes"
		}
		if s != "" {
			return ": write " + s
		}
	case n.kind == kindMapping && len(n.entries) == 1 && n.entries[0].value.kind == kindText && !f.kind.secret:
		// "- tag: edge" where "- tag:edge" was meant.
		e := n.entries[0]
		if _, err := f.kind.parse(e.key + ":" + e.value.text); err == nil {
			return fmt.Sprintf(": write %q, without a space", e.key+":"+e.value.text)
		}
	}
	return ""
}

// sectionAdvice says what to write where n stands in the place of a section, or of several.
func (f *field) sectionAdvice(n *node) string {
	switch {
	case f.typ.Kind() == reflect.Slice && n.kind == kindMapping && f.short == "":
		return ": begin it with a dash"
	case f.typ.Kind() == reflect.Slice && n.kind == kindMapping:
		return ": several are a list, begin each with a dash"
	case deref(f.typ) != actionType || n.kind != kindText:
		return ""
	case n.text == "reject":
		return ": write { reject: true }"
	}
	if t, err := parseTarget(n.text); err == nil {
		return fmt.Sprintf(": write { forward: %q }", t.String())
	}
	return ""
}

// unknownKey reports a key that its section does not have, and the one that was probably meant. The latter
// counts as present, so that it is not reported as missing too.
func (d *decoder) unknownKey(e entry, sec *Section, fields []field, noun string) {
	keys, key, lower := keysOf(fields), clipKey(e.key), strings.ToLower(e.key)
	meant := func(k string) {
		if !sec.has(k) {
			sec.places = append(sec.places, place{key: k, index: -1, pos: e.pos, keyPos: e.pos, unclear: true})
		}
	}
	// {reject:true} is, in YAML, a key without a value.
	k, _, found := strings.Cut(e.key, ":")
	if i := slices.Index(keys, k); found && i >= 0 {
		meant(k)
		if kind := fields[i].kind; kind != nil && !kind.secret {
			key = clip(e.key)
		}
		d.errorf(e.pos, "unknown key %q in %s: a space is missing behind %q", key, noun, k+":")
		return
	}
	free := slices.DeleteFunc(slices.Clone(keys), sec.has)
	guess := nearest(e.key, free)
	if s := synonyms[lower]; guess == "" && slices.Contains(free, s) {
		guess = s
	}
	// A key that another section has was probably meant for that one, unless it is just one letter off here.
	owner := ownerOf(e.key)
	switch {
	case guess != "" && (owner == "" || guess == synonyms[lower] || spelling.Distance(lower, guess) <= 1):
		meant(guess)
		d.errorf(e.pos, "unknown key %q in %s, did you mean %q?", key, noun, guess)
	case owner != "" && owner != noun:
		d.errorf(e.pos, "unknown key %q in %s: it belongs in %s", key, noun, owner)
	case nearest(e.key, keys) != "":
		d.errorf(e.pos, "unknown key %q in %s, did you mean %q, which is here already?", key, noun, nearest(e.key, keys))
	default:
		d.errorf(e.pos, "unknown key %q in %s, its keys are %s", key, noun, strings.Join(keys, ", "))
	}
}

// clipKey is clip for a key. What stands behind a colon in it was meant as a value, which may be a secret.
func clipKey(s string) string {
	if key, value, ok := strings.Cut(s, ":"); ok && value != "" {
		s = key + ":..."
	}
	return clip(s)
}

// synonyms maps what other software calls things to what they are called here.
var synonyms = map[string]string{
	"target": "forward", "to": "forward", "backend": "forward", "proxy_pass": "forward", "proxy": "forward",
	"drop": "reject", "proxy_protocol": "send_proxy",
	"server_name": "sni", "hostname": "sni", "match": "sni", "domain": "host", "domains": "host", "prefix": "path",
	"address": "listen", "addresses": "listen", "addr": "listen", "bind": "listen", "port": "listen",
	"type": "mode", "protocol": "mode", "rules": "routes", "fallback": "default", "tls": "certificates",
	"servers": "listeners", "admin": "control", "prometheus": "metrics", "key_file": "key", "cert_file": "cert", "domain_names": "names", "server": "directory", "acme_ca": "directory",
	"deny_from": "deny", "blacklist": "deny", "blocklist": "deny", "block": "deny", "rate_limit": "new_connections_per_source",
	"allow_from": "allow", "whitelist": "allow", "auth": "basic_auth", "basicauth": "basic_auth", "htpasswd": "file", "auth_request": "forward_auth", "forwardauth": "forward_auth",
	"auth_response_headers": "copy_headers", "accesslog": "access_log", "log": "access_log", "url": "address",
	"root": "ca", "ca_root": "ca", "ca_file": "ca", "dns_provider": "dns", "command": "exec", "program": "exec", "hook": "exec", "kid": "key_id", "hmac": "mac_key",
}

// ownerOf names the section that has a key, in the order in which sections stand in a file, or "".
func ownerOf(key string) string {
	var find func(t reflect.Type, noun string) string
	find = func(t reflect.Type, noun string) string {
		fields := fieldsOf(t)
		if slices.Contains(keysOf(fields), key) {
			return noun
		}
		for _, f := range fields {
			if f.kind == nil {
				if owner := find(deref(f.typ), f.noun); owner != "" {
					return owner
				}
			}
		}
		return ""
	}
	return find(reflect.TypeFor[Config](), "the configuration")
}

func keysOf(fields []field) []string {
	keys := make([]string, len(fields))
	for i, f := range fields {
		keys[i] = f.key
	}
	return keys
}

// deref returns the struct behind pointers and slices.
func deref(t reflect.Type) reflect.Type {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice {
		t = t.Elem()
	}
	return t
}

var (
	targetType = reflect.TypeFor[Target]()
	actionType = reflect.TypeFor[Action]()
)
