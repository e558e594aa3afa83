package userspace

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/tailsplice/tailsplice/"

// floors are the packages, from the ground up. A package imports only what stands on a lower floor than its own, unless
// exceptions has the import with a reason. Tests are held to the same, but for the packages of test/ and the helpers in
// the package's own folder.
//
// A new package takes its place in the commit that brings it, as low as its imports let it: what is high up can be used
// by few.
var floors = []struct {
	holds    string
	packages []string
}{
	{"the clock", []string{
		"userspace/moment",
	}},
	{"what several parts do alike, and says nothing of what they do it for", []string{
		"tcpsock",
		"userspace",
		"userspace/balance",
		"userspace/filestamp",
		"userspace/follow",
		"userspace/hook",
		"userspace/preface",
		"userspace/spelling",
	}},
	{"parts: each does one thing, and knows none of the others", []string{
		"userspace/accesslog",
		"userspace/acme",
		"userspace/acme/acmetest",
		"userspace/admin",
		"userspace/announce",
		"userspace/auth",
		"userspace/config",
		"userspace/container",
		"userspace/deny",
		"userspace/dial",
		"userspace/flow",
		"userspace/handover",
		"userspace/health",
		"userspace/limit",
		"userspace/logwriter",
		"userspace/metrics",
		"userspace/proxyheader",
		"userspace/route",
		"userspace/sni",
		"userspace/tailnet",
		"userspace/tlsterm",
		"userspace/transparent",
		"userspace/vhost",
		"userspace/wakelan",
	}},
	{"what the kernel is, has and lacks", []string{
		"loader/host",
	}},
	{"what each mechanism of the kernel side needs", []string{
		"loader/pins",
		"loader/prove",
	}},
	{"what tests do with any mechanism", []string{
		"loader/loadertest",
	}},
	{"the kernel side, mechanism by mechanism", []string{
		"loader/skmsg",
		"loader/sockmap",
	}},
	{"the kernel side's face", []string{
		"loader",
	}},
	{"the event loop: sockets and timers, and no flow", []string{
		"userspace/loop",
	}},
	{"what a datapath is, and which one a flow gets", []string{
		"userspace/datapath",
	}},
	{"how bytes are carried, and what a configuration means: neither needs the other", []string{
		"userspace/plan",
		"userspace/relay",
	}},
	{"what tests do with any datapath", []string{
		"userspace/relay/relaytest",
	}},
	{"what flows hold, kept within what there is: it knows flows, and asks whoever carries them by an interface; its tests carry them", []string{
		"userspace/memory",
	}},
	{"what serves: all of the above at work", []string{
		"userspace/server",
	}},
	{"commands, the only place where both sides meet", []string{
		"cmd/tailsplice",
	}},
}

// exceptions are the imports of our own packages that do not lead to a lower floor, each with its reason.
var exceptions = map[edge]string{
	{"loader/skmsg", "loader/sockmap"}: "a flow past TCP is one of sockmap's for the rest, with its verdict and maps",
}

// edge is an import, by the paths below the module.
type edge struct{ from, to string }

// heavy are the libraries that cost much to link and to read, and who may depend on them, through other packages too.
// The list is exact: a package that needs one no more is struck out.
var heavy = []struct {
	library string
	why     string
	users   []string
}{
	{"tailscale.com", "the LocalAPI's client brings a hundred packages: ask package tailnet",
		[]string{"userspace/tailnet", "userspace/plan", "userspace/server", "cmd/tailsplice"}},
	{"github.com/moby/moby", "only package container talks with Docker",
		[]string{"userspace/container", "userspace/plan", "userspace/server", "cmd/tailsplice"}},
	{"github.com/cilium/ebpf", "everything but the loader works on a kernel without BPF",
		[]string{"loader", "loader/host", "loader/pins", "loader/prove", "loader/skmsg", "loader/sockmap", "cmd/tailsplice"}},
	{"github.com/caddyserver/certmagic", "only package acme orders certificates",
		[]string{"userspace/acme", "userspace/plan", "userspace/server", "cmd/tailsplice"}},
	{"github.com/prometheus/client_golang", "packages count for themselves, metrics asks them",
		[]string{"userspace/metrics", "userspace/server", "cmd/tailsplice"}},
	{"github.com/goccy/go-yaml", "a configuration is read once, by package config",
		[]string{"userspace/config", "userspace/plan", "userspace/server", "cmd/tailsplice"}},
	{"github.com/google/nftables", "only package transparent changes the host's firewall",
		[]string{"userspace/transparent", "userspace/server", "cmd/tailsplice"}},
	{"github.com/vishvananda/netlink", "asking the kernel for routes and sockets needs Linux, and often privileges",
		[]string{"loader", "loader/skmsg", "userspace/transparent", "userspace/server", "cmd/tailsplice"}},
	{"github.com/spf13/cobra", "only commands have flags",
		[]string{"cmd/tailsplice"}},
	{"net/http", "what carries bytes knows no HTTP",
		[]string{"userspace/acme", "userspace/admin", "userspace/auth", "userspace/config", "userspace/container",
			"userspace/health", "userspace/metrics", "userspace/tailnet", "userspace/vhost", "userspace/plan", "userspace/server", "cmd/tailsplice"}},
}

// TestImports keeps the data flowing one way, and each package on its floor.
func TestImports(t *testing.T) {
	floor := map[string]int{}
	for i, f := range floors {
		for _, p := range f.packages {
			if _, twice := floor[p]; twice {
				t.Errorf("%s stands on two floors", p)
			}
			floor[p] = i
		}
	}
	exists, used := map[string]bool{}, map[edge]bool{}
	for _, p := range listPackages(t) {
		exists[p.path] = true
		if p.Doc == "" {
			t.Errorf("%s has no package doc comment: say in one what it is for", p.path)
		}
		for _, bad := range []string{"util", "common", "types"} {
			if strings.HasSuffix("/"+p.path, "/"+bad) {
				t.Errorf("%s: a package is a noun that says what it holds", p.path)
			}
		}
		if _, ok := floor[p.path]; !ok && !below(p.path, "test") {
			t.Errorf("%s stands on no floor: give it one in floors", p.path)
			continue
		}
		check := func(imports []string, forTests bool) {
			for _, imp := range imports {
				to, ours := strings.CutPrefix(imp, module)
				e := edge{p.path, to}
				if !ours || to == p.path {
					continue
				}
				if exceptions[e] != "" {
					used[e] = true
					continue
				}
				if why := forbidden(floor, e, forTests); why != "" {
					t.Errorf("%s must not import %s: %s", e.from, e.to, why)
				}
			}
		}
		check(p.Imports, false)
		check(append(p.TestImports, p.XTestImports...), true)
	}
	for p := range floor {
		if !exists[p] {
			t.Errorf("%s stands on a floor and does not exist", p)
		}
	}
	for e := range exceptions {
		if !used[e] {
			t.Errorf("the exception for %s importing %s is not used: strike it out", e.from, e.to)
		}
	}
}

// TestHeavyLibraries keeps what is light so, through whatever it imports.
func TestHeavyLibraries(t *testing.T) {
	packages := listPackages(t)
	for _, h := range heavy {
		var users []string
		for _, p := range packages {
			depends := slices.ContainsFunc(p.Deps, func(d string) bool { return below(d, h.library) })
			if !depends || below(p.path, "test") || strings.HasSuffix(p.path, "test") {
				continue
			}
			users = append(users, p.path)
			if !slices.Contains(h.users, p.path) {
				t.Errorf("%s must not depend on %s: %s", p.path, h.library, h.why)
			}
		}
		for _, p := range h.users {
			if !slices.Contains(users, p) && runtime.GOOS == "linux" {
				t.Errorf("%s does not depend on %s: strike it out", p, h.library)
			}
		}
	}
}

type listed struct {
	path                                     string // below the module
	ImportPath, Doc                          string
	Imports, TestImports, XTestImports, Deps []string
}

// listPackages asks go list for all packages of the module.
func listPackages(t *testing.T) (all []listed) {
	t.Helper()
	fields := "-json=ImportPath,Doc,Imports,TestImports,XTestImports,Deps"
	out, err := exec.Command("go", "list", fields, module+"...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p listed
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		p.path = strings.TrimPrefix(p.ImportPath, module)
		all = append(all, p)
	}
	if len(all) < 10 {
		t.Fatalf("go list found %d packages: this test looks in the wrong place", len(all))
	}
	return all
}

// forbidden says why e may not be, or "".
func forbidden(floor map[string]int, e edge, forTests bool) string {
	helper := strings.HasSuffix(e.from, "test")
	switch {
	case below(e.from, "test"):
		return ""
	case below(e.to, "test"):
		if forTests || helper {
			return ""
		}
		return "it is for tests"
	case forTests && below(e.to, e.from): // helpers of these tests
		return ""
	case below(e.from, "loader") && below(e.to, "userspace"):
		return "the loader is the kernel side alone; what it serves declares the interface"
	case below(e.from, "userspace") && below(e.to, "loader"):
		return "everything works without a loader: declare the interface that you need"
	case floor[e.to] == floor[e.from]:
		return "both stand on one floor (" + floors[floor[e.to]].holds + "): what stands above joins them"
	case floor[e.to] > floor[e.from]:
		return "it stands above (" + floors[floor[e.to]].holds + ")"
	}
	return ""
}

// below says whether a package is folder or stands in it.
func below(path, folder string) bool { return path == folder || strings.HasPrefix(path, folder+"/") }

func TestForbidden(t *testing.T) {
	floor := map[string]int{
		"userspace/spelling": 0, "userspace/sni": 1, "userspace/route": 1, "loader": 3,
		"userspace/relay": 6, "userspace/relay/relaytest": 7, "userspace/server": 8, "cmd/tailsplice": 9,
	}
	for _, c := range []struct {
		from, to string
		forTests bool
		bad      bool
	}{
		{"userspace/sni", "userspace/route", false, true},
		{"userspace/sni", "userspace/spelling", false, false},
		{"userspace/spelling", "userspace/sni", false, true},
		{"userspace/server", "userspace/route", false, false},
		{"userspace/route", "userspace/server", true, true},
		{"userspace/server", "loader", false, true},
		{"loader", "userspace/spelling", false, true},
		{"cmd/tailsplice", "loader", false, false},
		{"userspace/server", "cmd/tailsplice", true, true},
		{"userspace/relay/relaytest", "userspace/relay", false, false},
		{"userspace/relay", "userspace/relay/relaytest", true, false},
		{"userspace/relay", "userspace/relay/relaytest", false, true},
		{"userspace/relay", "test/wire", true, false},
		{"userspace/relay", "test/wire", false, true},
		{"userspace/relay/relaytest", "test/wire", false, false},
		{"test/datapath", "loader", true, false},
	} {
		if got := forbidden(floor, edge{c.from, c.to}, c.forTests) != ""; got != c.bad {
			t.Errorf("forbidden(%s, %s), for tests %v, is %v", c.from, c.to, c.forTests, got)
		}
	}
}
