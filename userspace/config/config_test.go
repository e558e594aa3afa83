package config

import (
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
)

var update = flag.Bool("update", false, "write what the tests find into testdata and schema.json")

// golden is one case of a txtar archive in testdata: NAME.yaml and the messages expected, NAME.want.
type golden struct {
	archive, name string
	yaml          []byte
	want          string
}

// goldens reads an archive. With -update each case's want is replaced by what messages says.
func goldens(t testing.TB, archive string, messages func(golden) string) []golden {
	t.Helper()
	path := filepath.Join("testdata", "errors", archive+".txtar")
	ar, err := txtar.ParseFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var cases []golden
	for _, f := range ar.Files {
		name, ext := strings.TrimSuffix(f.Name, filepath.Ext(f.Name)), filepath.Ext(f.Name)
		switch {
		case ext == ".yaml":
			if slices.ContainsFunc(cases, func(g golden) bool { return g.name == name }) {
				t.Fatalf("%s has two cases %s", path, name)
			}
			cases = append(cases, golden{archive: archive, name: name, yaml: f.Data})
		case ext == ".want" && len(cases) > 0 && cases[len(cases)-1].name == name:
			cases[len(cases)-1].want = string(f.Data)
		default:
			t.Fatalf("%s: unexpected %s", path, f.Name)
		}
	}
	if *update && messages != nil {
		ar.Files = nil
		for i := range cases {
			cases[i].want = messages(cases[i])
			ar.Files = append(ar.Files,
				txtar.File{Name: cases[i].name + ".yaml", Data: cases[i].yaml},
				txtar.File{Name: cases[i].name + ".want", Data: []byte(cases[i].want)})
		}
		if err := os.WriteFile(path, txtar.Format(ar), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if len(cases) == 0 {
		t.Fatalf("%s has no case", path)
	}
	return cases
}

// errorArchives hold files that Parse refuses.
var errorArchives = []string{"syntax", "structure", "values", "meaning", "acme", "docker", "http", "access", "strangers",
	"variables", "health"}

// TestErrors compares every message of every wrong file, with its exact place.
func TestErrors(t *testing.T) {
	setVariables(t)
	messages := func(g golden) string {
		_, err := Parse(g.name+".yaml", g.yaml)
		if err == nil {
			return "no error\n"
		}
		return err.Error() + "\n"
	}
	for _, archive := range errorArchives {
		for _, g := range goldens(t, archive, messages) {
			t.Run(archive+"/"+g.name, func(t *testing.T) {
				c, err := Parse(g.name+".yaml", g.yaml)
				if err == nil {
					t.Fatal("accepted")
				}
				if c != nil {
					t.Error("a configuration comes with the error")
				}
				var all Errors
				if !errors.As(err, &all) || len(all) == 0 {
					t.Fatalf("the error is %T, want Errors", err)
				}
				checkPlaces(t, g.yaml, all)
				if diff := cmp.Diff(g.want, messages(g)); diff != "" {
					t.Errorf("messages (-want +got):\n%s", diff)
				}
			})
		}
	}
}

// TestWarnings compares the warnings of files that are accepted.
func TestWarnings(t *testing.T) {
	messages := func(g golden) string {
		c, err := Parse(g.name+".yaml", g.yaml)
		if err != nil {
			return "refused: " + err.Error() + "\n"
		}
		var b strings.Builder
		for _, w := range c.Warnings {
			b.WriteString(w.Error() + "\n")
		}
		return b.String()
	}
	for _, g := range goldens(t, "warnings", messages) {
		t.Run(g.name, func(t *testing.T) {
			c, err := Parse(g.name+".yaml", g.yaml)
			if err != nil {
				t.Fatal(err)
			}
			checkPlaces(t, g.yaml, c.Warnings)
			if diff := cmp.Diff(g.want, messages(g)); diff != "" {
				t.Errorf("warnings (-want +got):\n%s", diff)
			}
		})
	}
}

// checkPlaces checks that every error points into the file (or right behind the end of a line), that they
// are in the order of the file, and take one line each.
func checkPlaces(t *testing.T, yaml []byte, errs []*Error) {
	t.Helper()
	lines := strings.Split(strings.TrimPrefix(string(yaml), "\ufeff"), "\n")
	for i, e := range errs {
		if e.Pos.Line < 1 || e.Pos.Line > len(lines) || e.Pos.Col < 1 || e.Pos.Col > len([]rune(lines[e.Pos.Line-1]))+1 {
			t.Errorf("%v is outside the file of %d lines", e, len(lines))
		}
		if i > 0 && e.Pos.compare(errs[i-1].Pos) < 0 {
			t.Errorf("%v comes after %v", e, errs[i-1])
		}
		if e.Message == "" || strings.ContainsAny(e.Error(), "\n\r") {
			t.Errorf("%q is not one line", e.Error())
		}
	}
}

// validFiles lists the files that must load: those in testdata, and the examples.
func validFiles(t testing.TB) []string {
	t.Helper()
	var files []string
	for _, pattern := range []string{filepath.Join("testdata", "valid", "*.yaml"), filepath.Join("..", "..", "examples", "*.yaml")} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		if len(found) == 0 {
			t.Fatalf("no file is called %s", pattern)
		}
		files = append(files, found...)
	}
	return files
}

func TestValidFilesLoad(t *testing.T) {
	for _, file := range validFiles(t) {
		c, err := Load(file)
		if err != nil {
			t.Error(err)
			continue
		}
		for _, w := range c.Warnings {
			t.Errorf("warning: %v", w)
		}
		if c.File != file || c.Node == "" {
			t.Errorf("%s: File is %q, Node is %q", file, c.File, c.Node)
		}
		for _, l := range c.Listeners {
			if l.Name == "" || !l.Pos.IsValid() {
				t.Errorf("%s: a listener has name %q, position %v", file, l.Name, l.Pos)
			}
		}
	}
}

// ignorePlaces compares configurations without where they stand.
var ignorePlaces = cmp.Options{
	cmp.FilterPath(func(p cmp.Path) bool { return p.Last().String() == ".Section" }, cmp.Ignore()),
}

// TestDesign checks the three examples of the configuration contract, as they are written there.
func TestDesign(t *testing.T) {
	limits := Limits{Connections: 65536, ConnectionsPerSource: 256, Requests: 8192, RequestsPerSource: 256, HelloTimeout: 5 * time.Second, HelloBytes: 65536, IdleTimeout: time.Hour, FlowBuffer: 2 << 20}
	control := Control{Socket: "/run/tailsplice/control.sock"}
	tailnet := func(node string, port uint16) Target { return Target{Scheme: "tailnet", Host: node, Port: port} }
	to := func(t Target) []*Forward { return []*Forward{{To: t, Weight: 1}} }
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []*Config{
		{
			File: "design-edge.yaml", Node: "edge-waw", Datapath: "auto", Limits: limits,
			Control: Control{Socket: control.Socket, Metrics: "127.0.0.1:9464"},
			Listeners: []*Listener{{
				Name: "web", Listen: []string{":443"}, Mode: "sni",
				Routes: []*Route{
					{SNI: []string{"status.vsq.cz"}, Action: Action{Forward: to(Target{Scheme: "tcp", Host: "127.0.0.1", Port: 8443})}},
					{SNI: []string{"*.vsq.cz"}, ALPN: []string{"acme-tls/1"}, Action: Action{Forward: to(tailnet("home", 443)), SendProxy: "v2"}},
				},
				Default: &Action{Forward: to(tailnet("home", 443)), SendProxy: "v2"},
			}},
		},
		{
			File: "design-home.yaml", Node: "home", Datapath: "auto", Limits: limits, Control: control,
			Listeners: []*Listener{{
				Name: "web", Listen: []string{"tailnet:443"}, Mode: "https",
				AcceptProxy: &AcceptProxy{From: []string{"tag:edge"}},
				Certificates: []*Certificate{
					{Files: &CertFiles{Cert: "/etc/tailsplice/vsq.pem", Key: "/etc/tailsplice/vsq.key"}},
					{ACME: &ACME{Names: []string{"example.vsq.cz"}, Email: "me@vsq.cz", Directory: "https://acme.example/dir", Storage: "/var/lib/tailsplice/acme"}},
					{Tailscale: true},
				},
				Routes:  []*Route{{Host: []string{"notes.vsq.cz"}, Path: "/api/", Action: Action{Forward: to(Target{Scheme: "tcp", Host: "127.0.0.1", Port: 3000})}}},
				Default: &Action{Forward: to(tailnet("laptop", 8080))},
			}},
		},
		{
			File: "design-laptop.yaml", Node: "laptop", Datapath: "auto", Limits: limits, Control: control,
			Listeners: []*Listener{{
				Name: "web", Listen: []string{"tailnet:8080"}, Mode: "http",
				AcceptProxy: &AcceptProxy{From: []string{"tag:home"}},
				Routes:      []*Route{{Host: []string{"example.vsq.cz"}, Action: Action{Forward: to(Target{Scheme: "docker", Host: "blog", Port: 8080})}}},
			}},
		},
		{
			File: "design-targets.yaml", Node: "edge-waw", Datapath: "auto", Limits: limits, Control: control,
			Listeners: []*Listener{{
				Name: "web", Listen: []string{":443"}, Mode: "sni",
				Routes: []*Route{{SNI: []string{"*.vsq.cz"}, Action: Action{
					Forward: []*Forward{{To: tailnet("home", 443), Weight: 1}, {To: tailnet("laptop", 8443), Weight: 1, Backup: true}},
					Balancing: Balancing{OnDown: "keep", Health: &Health{Check: "connect", Every: 5 * time.Second, Timeout: 2 * time.Second,
						Rise: 2, Fall: 3, Path: "/", SlowStart: 30 * time.Second}}}}},
			}},
		},
		{
			File: "four-lines.yaml", Node: host, Datapath: "auto", Limits: limits, Control: control,
			Listeners: []*Listener{{Name: "sni-443", Listen: []string{":443"}, Mode: "sni", Default: &Action{Forward: to(tailnet("home", 443))}}},
		},
	} {
		want.File = filepath.Join("testdata", "valid", want.File)
		got, err := Load(want.File)
		if err != nil {
			t.Error(err)
			continue
		}
		if diff := cmp.Diff(want, got, ignorePlaces); diff != "" {
			t.Errorf("%s (-want +got):\n%s", want.File, diff)
		}
	}
}

func parse(t *testing.T, file, yaml string) *Config {
	t.Helper()
	c, err := Parse(file, []byte(yaml))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestDefaults(t *testing.T) {
	c := parse(t, "edge.yaml", `
listeners:
  - { listen: "192.0.2.1:443", mode: sni, default: { forward: "a:1" } }
  - { listen: "192.0.2.2:443", mode: sni, default: { forward: "a:1" } }
  - { listen: ["[2001:db8::1]:8443", ":80"], mode: tcp, default: { forward: "a:1" } }
  - { name: sni-443-2, listen: "192.0.2.3:443", mode: sni, default: { forward: "a:1" } }
limits: { connections: 100, requests: 50 }
`)
	var names []string
	for _, l := range c.Listeners {
		names = append(names, l.Name)
	}
	if got, want := strings.Join(names, " "), "sni-443 sni-443-3 tcp-8443 sni-443-2"; got != want {
		t.Errorf("names of listeners are %q, want %q", got, want)
	}
	if c.Limits.ConnectionsPerSource != 100 {
		t.Errorf("connections_per_source is %d where connections is 100", c.Limits.ConnectionsPerSource)
	}
	if c.Limits.RequestsPerSource != 50 {
		t.Errorf("requests_per_source is %d where requests is 50", c.Limits.RequestsPerSource)
	}
	if c.Limits.IdleTimeout != time.Hour {
		t.Errorf("the limits that are not there: idle_timeout is %v", c.Limits.IdleTimeout)
	}
}

// TestCanonical checks the forms that the rest of the program may rely on.
func TestCanonical(t *testing.T) {
	c := parse(t, "edge.yaml", `
listeners:
  - listen: ["TAILNET:80", "[2001:DB8:0:0::1]:443", "[::ffff:192.0.2.1]:443", "[fe80::1%eth0]:443"]
    mode: sni
    accept_proxy: { from: ["2001:DB8::/32", "::ffff:192.0.2.1", Edge.Example., Me@Example.org] }
    routes: [{ sni: [Example.ORG., "*.Example.NET"], forward: "[2001:DB8::0:1]:443" }, { sni: a.org, forward: "Home.:443" }]
    default: { forward: "tailnet://[fd7a:115c:a1e0:0::1]:443" }
  - { listen: ":81", mode: tcp, default: { forward: "tailnet://[::ffff:100.64.0.1]:443" } }
`)
	l := c.Listeners[0]
	for _, x := range []struct {
		what      string
		got, want []string
	}{
		{"listen", l.Listen, []string{"tailnet:80", "[2001:db8::1]:443", "192.0.2.1:443", "[fe80::1%eth0]:443"}},
		{"from", l.AcceptProxy.From, []string{"2001:db8::/32", "192.0.2.1", "edge.example", "Me@Example.org"}},
		{"sni", l.Routes[0].SNI, []string{"example.org", "*.example.net"}},
		{"forward", []string{l.Routes[0].Target().String(), l.Routes[1].Target().String(), l.Default.Target().String(), c.Listeners[1].Default.Target().String()},
			[]string{"[2001:db8::1]:443", "home:443", "tailnet://[fd7a:115c:a1e0::1]:443", "tailnet://100.64.0.1:443"}},
	} {
		if !slices.Equal(x.got, x.want) {
			t.Errorf("%s is %q, want %q", x.what, x.got, x.want)
		}
	}
}

func TestPaths(t *testing.T) {
	yaml := `
listeners: [{ listen: ":443", mode: https, certificates: [{ files: { cert: certs/a.pem, key: /etc/a.key } }], default: { forward: "a:1" } }]
control: { socket: ../run/a.sock }
`
	for _, c := range []struct{ file, cert, key, socket string }{
		{"/etc/tailsplice/edge.yaml", "/etc/tailsplice/certs/a.pem", "/etc/a.key", "/etc/run/a.sock"},
		{"conf/edge.yaml", "conf/certs/a.pem", "/etc/a.key", "run/a.sock"},
		{"edge.yaml", "certs/a.pem", "/etc/a.key", "../run/a.sock"},
	} {
		got := parse(t, c.file, yaml)
		files := got.Listeners[0].Certificates[0].Files
		if files.Cert != c.cert || files.Key != c.key || got.Control.Socket != c.socket {
			t.Errorf("%s: cert %q, key %q, socket %q", c.file, files.Cert, files.Key, got.Control.Socket)
		}
	}
}

// TestPlaces checks the positions that later errors are reported with.
func TestPlaces(t *testing.T) {
	c := parse(t, "edge.yaml", `listeners:
  - name: web
    listen: [":443", "192.0.2.1:80"]
    mode: https
    certificates:
      - files:
          cert: a.pem
          key: a.key
    routes:
      - host:
          - a.org
          - "*.a.org"
        path: /x
        forward: "a:1"
    default: { forward: "b:1" }
`)
	l := c.Listeners[0]
	r := l.Routes[0]
	for _, x := range []struct {
		what string
		got  Pos
		want Pos
	}{
		{"config", c.Pos, Pos{1, 1}},
		{"listener", l.Pos, Pos{2, 5}},
		{"listen[0]", l.At("listen", 0), Pos{3, 14}},
		{"listen[1]", l.At("listen", 1), Pos{3, 22}},
		{"listen", l.At("listen"), Pos{3, 13}},
		{"listen[7], which is not there", l.At("listen", 7), Pos{3, 13}},
		{"mode", l.At("mode"), Pos{4, 11}},
		{"accept_proxy, which is not there", l.At("accept_proxy"), Pos{2, 5}},
		{"certificate", l.Certificates[0].Pos, Pos{6, 9}},
		{"files", l.Certificates[0].At("files"), Pos{7, 11}},
		{"cert", l.Certificates[0].Files.At("cert"), Pos{7, 17}},
		{"route", r.Pos, Pos{10, 9}},
		{"host[1]", r.At("host", 1), Pos{12, 13}},
		{"forward", r.At("forward"), Pos{14, 18}},
		{"default", l.Default.Pos, Pos{15, 14}},
		{"default's forward", l.Default.At("forward"), Pos{15, 25}},
		{"limits, which are not there", c.Limits.At("connections"), Pos{}},
	} {
		if x.got != x.want {
			t.Errorf("%s is at %v, want %v", x.what, x.got, x.want)
		}
	}
	if got, want := c.Errorf(l.At("listen", 1), "bind: %v", os.ErrPermission).Error(), "edge.yaml:3:22: bind: permission denied"; got != want {
		t.Errorf("Errorf: %q, want %q", got, want)
	}
	if got, want := c.Errorf(c.Limits.Pos, "too few files").Error(), "edge.yaml: too few files"; got != want {
		t.Errorf("Errorf: %q, want %q", got, want)
	}
	if got, want := new(Config).Errorf(Pos{}, "x").Error(), "configuration: x"; got != want {
		t.Errorf("Errorf: %q, want %q", got, want)
	}
}

// TestBytes holds what cannot be seen in a golden file.
func TestBytes(t *testing.T) {
	const good = "listeners: [{ listen: \":443\", mode: tcp, default: { forward: \"a:1\" } }]\n"
	for _, c := range []struct{ name, yaml, want string }{
		{"byte order mark", "\ufeff" + good, ""},
		{"byte order mark, columns", "\ufeffnod: x\n" + good, `f:1:1: unknown key "nod" in the configuration, did you mean "node"?`},
		{"windows lines", strings.ReplaceAll(good+"node: x\n", "\n", "\r\n"), ""},
		{"windows lines, columns", strings.ReplaceAll(good+"\nlimits:\n  connections: -1\n  nod: x\n", "\n", "\r\n"), `f:4:16: connections "-1": must be a whole number in plain digits
f:5:3: unknown key "nod" in limits: it belongs nowhere`},
		{"windows lines, flow", "listeners: [{ listen:\r\n  \":443\", mode: tcp, default:\r\n  { forward: \"a:1\" } }]\r\n", ""},
		{"no newline at the end", strings.TrimSpace(good), ""},
		{"tab", "listeners:\n\t- listen: \":443\"\n", "f:2:1: not valid YAML: YAML is indented with spaces, not with tabs"},
		{"tab in a value", good + "node: 12\t7\n", `f:2:9: a tab: use spaces, or \t in double quotes`},
		{"tab in a key", good + "no\tde: 12\n", `f:2:3: a tab: use spaces, or \t in double quotes`},
		{"tab in quotes", good + "node: \"a\tb\"\n", `f:2:9: a tab: use spaces, or \t in double quotes`},
		{"tabs in comments", "#\ta\n" + good + "node: x # a\tb\n", ""},
		{"tab before a comment", good + "node: x\t# a\tb\n", ""},
		{"tab at the end", good + "node: x\t \n", ""},
		{"NUL", good + "node: a\x00b\n", "f:2:8: the invisible character U+0000 does not belong here"},
		{"escape", good + "# \x1b[31m\n", "f:2:3: the invisible character U+001B does not belong here"},
		{"lone return", good + "node: a\rb\n", "f:2:8: the invisible character U+000D does not belong here"},
		{"mark in the middle", good + "node: ž\ufeff\n", "f:2:8: the invisible character U+FEFF does not belong here"},
		{"not UTF-8", good + "node: ž\xff\n", "f:2:8: byte 0xff is not UTF-8 text"},
		{"replacement character", good + "node: \ufffd\n", `f:2:7: node "�": it may have letters, digits and, between them, '.', '_' and '-'`},
		{"UTF-16", "\xff\xfen\x00o\x00", "f:1:1: the file is UTF-16: save it as UTF-8"},
		{"nothing", "", "f:1:1: the file is empty: it needs at least listeners, with listen, mode and a target"},
		{"too large", good + strings.Repeat("#\n", MaxFileBytes/2), "f:1:1: the file is larger than 16 MiB"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Parse("f", []byte(c.yaml))
			got := ""
			if err != nil {
				got = err.Error()
				checkPlaces(t, []byte(c.yaml), err.(Errors))
			}
			want := strings.ReplaceAll(c.want, ": it belongs nowhere", ", its keys are connections, connections_per_source, requests, requests_per_source, hello_timeout, hello_bytes, idle_timeout, memory, flow_buffer, new_connections_per_source")
			if got != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}
		})
	}
}

func TestLoadErrors(t *testing.T) {
	dir := t.TempDir()
	_, err := Load(filepath.Join(dir, "none.yaml"))
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "none.yaml") || !strings.Contains(err.Error(), "--config") {
		t.Errorf("no file: %v", err)
	}
	if _, err = Load(dir); err == nil || !strings.Contains(err.Error(), "folder") {
		t.Errorf("a folder: %v", err)
	}
	large := filepath.Join(dir, "large.yaml")
	if err := os.WriteFile(large, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(large, 1<<40); err != nil {
		t.Fatal(err)
	}
	if _, err = Load(large); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("a terabyte: %v", err)
	}
}

func TestErrorsUnwrap(t *testing.T) {
	_, err := Parse("f", []byte("nod: 1\n"))
	var one *Error
	if !errors.As(err, &one) || one.Pos != (Pos{1, 1}) || one.File != "f" {
		t.Errorf("errors.As finds %+v in %v", one, err)
	}
}

// TestOneLine checks that nothing in a file can make a message look like two.
func TestOneLine(t *testing.T) {
	r := &reporter{file: "f"}
	r.errorf(Pos{1, 1}, "%s", "a\nf:1:1: b\x1b[31m")
	r.warnf(Pos{1, 1}, "%s", "a\r\nb")
	if got, want := r.errs[0].Error()+"|"+r.warnings[0].Error(), "f:1:1: a f:1:1: b [31m|f:1:1: a  b"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestTargetString(t *testing.T) {
	for _, s := range []string{
		"127.0.0.1:8080", "[::1]:8080", "[fe80::1%eth0]:80", "home:443", "my_host:1", "tailnet://home:443", "tailnet://home.tail1234.ts.net:65535",
		"tailnet://100.64.0.1:443", "tailnet://[fd7a:115c:a1e0::1]:443", "docker://blog:8080", "docker://project/web:80",
		"docker://a.b_c-D:1", "unix:///run/app.sock", "unix:///a b",
	} {
		target, err := parseTarget(s)
		if err != nil || target.String() != s {
			t.Errorf("%q is %q, %v", s, target, err)
		}
	}
	if s := (Target{}).String(); s != "" {
		t.Errorf("no target is %q", s)
	}
}

// FuzzParse checks that no file makes the parser panic, or report something outside of the file, that the
// schema allows all that is accepted, and that what is accepted means the same when it is written again.
func FuzzParse(f *testing.F) {
	for _, archive := range append([]string{"warnings"}, errorArchives...) {
		for _, g := range goldens(f, archive, nil) {
			f.Add(g.yaml)
		}
	}
	for _, file := range validFiles(f) {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	schema := compileSchema(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse("f", data)
		if err != nil {
			var all Errors
			if !errors.As(err, &all) || len(all) == 0 || c != nil {
				t.Fatalf("the error is %T, the configuration %v", err, c)
			}
			checkPlaces(t, data, all)
			for _, e := range all {
				if strings.Contains(e.Message, "the YAML library cannot read this file") {
					t.Logf("goccy/go-yaml panics: %v", e)
				}
			}
			return
		}
		checkPlaces(t, data, c.Warnings)
		if err := schema.Validate(plain(t, data)); err != nil {
			t.Errorf("the schema refuses what Parse accepts: %v", err)
		}
		if len(c.Listeners) == 0 || c.Node == "" {
			t.Errorf("accepted without listeners or node: %+v", c)
		}
		for _, l := range c.Listeners {
			actions := []*Action{l.Default}
			for i := range l.Routes {
				actions = append(actions, &l.Routes[i].Action)
			}
			for _, a := range actions {
				if a == nil || a.Reject {
					continue
				}
				for _, f := range a.Forward {
					if again, err := parseTarget(f.To.String()); err != nil || again != f.To {
						t.Errorf("%q is %+v when read again, %v", f.To, again, err)
					}
				}
			}
			for _, addr := range l.Listen {
				if again, err := parseListen(addr); err != nil || again != addr {
					t.Errorf("%q is %q when read again, %v", addr, again, err)
				}
			}
		}
	})
}

// BenchmarkParse reads a configuration of 100,000 routes, each with a name of its own.
func BenchmarkParse(b *testing.B) {
	var y strings.Builder
	y.WriteString("listeners:\n  - listen: [\":443\"]\n    mode: sni\n    routes:\n")
	for i := range 100_000 {
		fmt.Fprintf(&y, "      - sni: [n%d.example.org]\n        forward: tailnet://home:443\n", i)
	}
	data := []byte(y.String())
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		if _, err := Parse("f", data); err != nil {
			b.Fatal(err)
		}
	}
}

// TestSecrets puts secrets where they belong and where they don't, each with something wrong about them: no message may
// show one, for logs and terminals are read by others.
func TestSecrets(t *testing.T) {
	const pem = `"-----BEGIN PRIVATE KEY-----\nhunter2MC4CAQAwBQYDK2VwBCIEIOG2\n-----END PRIVATE KEY-----"`
	der := base64.StdEncoding.EncodeToString(append([]byte{0x30, 0x2e}, "hunter2hunter2hunter2hunter2hunter2hunter2"...))
	lines := "|\n          " + der[:28] + "\n          " + der[28:]
	route := func(s string) string {
		return "listeners:\n  - listen: ':80'\n    mode: http\n    routes:\n      - { host: a.test, forward: 'b:1', " + s + " }\n"
	}
	acme := func(s string) string {
		return "listeners:\n  - listen: ':443'\n    mode: https\n    default: { forward: 'b:1' }\n    certificates: [ { acme: { names: a.test, " + s + " } } ]\n"
	}
	files := func(s string) string {
		return "listeners:\n  - listen: ':443'\n    mode: https\n    default: { forward: 'b:1' }\n    certificates:\n      - files:\n          cert: a\n          key: " + s + "\n"
	}
	for _, yaml := range []string{
		acme(`eab: { key_id: a, mac_key: "hunter2/+" }`),
		acme(`eab: { key_id: a, mac_key: "hunter2 !" }`),
		acme(`eab: { key_id: a, mac_key: "hunter2\n" }`),
		acme(`eab: { key_id: a, mac_key:hunter2 }`),
		acme(`eab: { key_id: a, mac_kee:hunter2 }`),
		acme(`eab: { key_id: a, mac_key: [hunter2] }`),
		acme(`eab: { key_id: a, mac_key: { hunter2: hunter2 } }`),
		acme(`eab: { key_id: a mac_key: hunter2 }`),
		acme(`eab: { mac_key: hunter2 key_id: a }`),
		acme(`eab: { key_id: a, mac_key: !hunter2 }`),
		acme(`eab: { key_id: a, mac_key: &hunter2 }`),
		acme(`eab: { key_id: a, mac_key: "hunter2 }`),
		acme(`eab: { key_id: a, mac_key: @hunter2 }`),
		acme(`eab: "hunter2"`),
		acme(`directory: "https://me:hunter2@ca.test/dir"`),
		acme(`directory: "http://hunter2:hunter2@ca.test/dir"`),
		acme(`ca: ` + pem),
		route(`basic_auth: { users: { me: hunter2 } }`),
		route(`basic_auth: { users: { "me:hunter2": x } }`),
		route(`basic_auth: { users: { me:hunter2 } }`),
		route(`basic_auth: { users: "me:hunter2" }`),
		route(`basic_auth: { users: ["me:hunter2"] }`),
		route(`basic_auth: { users: { me: "hunter2\n" } }`),
		route(`basic_auth: { "me:hunter2" }`),
		route(`basic_auth: "me:hunter2"`),
		route(`basic_auth: { users: { "me:hunter2\n": x } }`),
		route(`"basic_auth:me:hunter2": x`),
		route(`forward_auth: { address: "http://me:hunter2@auth.test/" }`),
		route(`forward_auth: { address: "me:hunter2@auth.test/" }`),
		route(`forward_auth: { address: "http://me:p@hunter2@auth.test/" }`),
		route(`redirect: "https://me:hunter2@b.test/"`),
		route(`request_headers: { set: { Authorization: "Bearer hunter2 " } }`),
		route(`request_headers: { set: { Authorization: "Bearer hunter2\n" } }`),
		route(`request_headers: { set: { Authorization: { Bearer: hunter2 } } }`),
		route(`request_headers: { set: { "Authorization:hunter2": x } }`),
		route(`request_headers: { set: { "Authorization: hunter2" } }`),
		route(`headers: { X-Token: " hunter2" }`),
		strings.Replace(route(`max_body: 1`), "'b:1'", `"http://me:hunter2@b.test:80/"`, 1),
		strings.Replace(route(`max_body: 1`), "'b:1'", `"me:hunter2@b.test:80"`, 1),
		strings.Replace(route(`max_body: 1`), "a.test", `"https://me:hunter2@a.test/"`, 1),
		strings.Replace(route(`max_body: 1`), "a.test", `"me:hunter2@a.test/x"`, 1),
		files(pem),
		files(`"` + der + `"`),
		files(lines),
	} {
		_, err := Parse("f.yaml", []byte(yaml))
		if err == nil {
			t.Errorf("accepted: %s", yaml)
			continue
		}
		if text := err.Error(); strings.Contains(text, "hunter2") || strings.Contains(text, der[8:16]) || strings.Contains(text, der[36:44]) {
			t.Errorf("the message shows a secret: %s\nof %s", text, yaml)
		}
	}
	if _, err := Parse("f.yaml", []byte(route(`request_headers: { set: { Authorization: 4711 } }`))); err == nil || strings.Contains(err.Error(), "4711") {
		t.Errorf("a header that is a number: %v", err)
	}
}
