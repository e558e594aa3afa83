package userspace

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"strings"
	"testing"
)

const module = "github.com/tailsplice/tailsplice/"

// TestImports keeps the data flowing one way. Each rule says why it is there.
func TestImports(t *testing.T) {
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,TestImports,XTestImports,Doc,Name", module+"...")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	dec := json.NewDecoder(strings.NewReader(string(out)))
	packages := 0
	for {
		var p struct {
			ImportPath, Name, Doc              string
			Imports, TestImports, XTestImports []string
		}
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		packages++
		path := strings.TrimPrefix(p.ImportPath, module)
		if p.Doc == "" {
			t.Errorf("%s has no package doc comment: say in one what it is for", path)
		}
		for _, bad := range []string{"util", "common", "types"} {
			if strings.HasSuffix(path, "/"+bad) {
				t.Errorf("%s: a package is a noun that says what it holds", path)
			}
		}
		for _, imp := range p.Imports {
			forTests := strings.HasPrefix(path, "test/") || path == "userspace/relay/relaytest"
			if strings.HasPrefix(imp, module+"test/") && !forTests {
				t.Errorf("%s must not import %s: it is for tests", path, imp)
			}
		}
		for _, imp := range append(append(p.Imports, p.TestImports...), p.XTestImports...) {
			to, ours := strings.CutPrefix(imp, module)
			if why := forbidden(path, to); ours && why != "" {
				t.Errorf("%s must not import %s: %s", path, to, why)
			}
		}
	}
	if packages < 10 {
		t.Fatalf("go list found %d packages: this test looks in the wrong place", packages)
	}
}

// forbidden says why from must not import to (both below the module), or "".
func forbidden(from, to string) string {
	in := func(path, folder string) bool { return path == folder || strings.HasPrefix(path, folder+"/") }
	switch {
	case in(from, to) || in(to, from) && !in(from, "userspace/front"): // a package's own tests and helpers
		return ""
	// These import none of ours, and only tests need them.
	case in(to, "test/wire"), in(to, "test/cgroup"), in(to, "test/logs"), in(to, "test/selfsigned"),
		in(to, "test/reference"):
		return ""
	case to == "userspace/spelling": // likewise, and nothing to join
		return ""
	case in(from, "loader"):
		return "the loader is the kernel side alone; what it serves declares the interface"
	case in(from, "userspace") && in(to, "loader"):
		return "everything works without a loader: declare the interface that you need"
	case in(to, "cmd"):
		return "nothing imports a command"
	case in(from, "userspace/front"), in(from, "cmd"), in(from, "test"):
		return ""
	case in(from, "userspace") && in(to, "userspace"):
		return "leaf packages import none of ours: front joins them"
	}
	return ""
}

func TestForbidden(t *testing.T) {
	for _, c := range []struct {
		from, to string
		bad      bool
	}{
		{"userspace/sni", "userspace/route", true},
		{"userspace/front", "userspace/route", false},
		{"userspace/front", "loader", true},
		{"loader", "userspace/relay", true},
		{"cmd/tailsplice", "loader", false},
		{"userspace/relay/relaytest", "userspace/relay", false},
		{"userspace/relay", "userspace/relay/relaytest", false},
		{"userspace/relay/relaytest", "userspace/sni", true},
	} {
		if got := forbidden(c.from, c.to) != ""; got != c.bad {
			t.Errorf("forbidden(%s, %s) = %v", c.from, c.to, got)
		}
	}
}
