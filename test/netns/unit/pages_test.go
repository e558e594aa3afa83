package unit

import (
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// typedBy has, by test, the commands of docs/install.md and of README's installation that it types as written:
// lines of blocks, and what stands in backticks in the text.
var typedBy = map[string][]string{
	"TestPackages": {
		"git clone https://github.com/tailsplice/tailsplice && cd tailsplice",
		"make packages",
		"sudo apt-get install ./build/packages/tailsplice_*_amd64.deb",
		"sudo apt install ./tailsplice_*_amd64.deb",
		"curl http://127.0.0.1:8480/metrics",
		"systemd-analyze security tailsplice",
		"tailsplice check && sudo systemctl reload tailsplice",
		"sudo tailsplice upgrade",
		"tailsplice status",
		"sudo adduser tailsplice docker && sudo systemctl restart tailsplice",
		"sudo apt remove tailsplice",
		"sudo apt purge tailsplice",
		"sudo tar -C /usr/local --strip-components=1 -xzf tailsplice-*-linux-amd64.tar.gz",
		"sudo systemd-sysusers /usr/local/lib/sysusers.d/tailsplice.conf",
		"sudo install -D -m 644 /usr/local/share/doc/tailsplice/tailsplice.yaml /etc/tailsplice/tailsplice.yaml",
		"sudo systemctl daemon-reload",
		"sudo systemctl enable --now tailsplice",
	},
	"TestFirstPage": {
		"sudo apt install ./tailsplice_*_amd64.deb",
		"sudo tailsplice init edge --names example.org",
		"sudo apt install curl",
		"curl -fsSL https://tailscale.com/install.sh | sh",
		"sudo tailscale up --advertise-tags=tag:edge",
		"sudo tailscale up --advertise-tags=tag:home",
		"sudo systemctl restart tailsplice",
		"sudo tailsplice init home --names example.org --forward 127.0.0.1:3000 --email you@example.org",
		"curl https://example.org",
		"tailsplice doctor",
		"tailsplice trace example.org",
	},
	"TestUnit":         {"make build && sudo make install", "sudo systemctl edit tailsplice"},
	"TestBuildNeedsGo": {"make build"},
	"TestCrash":        {"journalctl -u tailsplice -g 'process before this one'"},
}

// notTyped are the other ones, and why.
var notTyped = map[string]string{
	"sudo systemctl restart tailscaled":           "the unit is Tailscale's",
	"docker load -i tailsplice-*-image-amd64.tar": "TestEdge types it, which has a dockerd",
	"tailsplice init":                             "a name in the text; blocks have it with a role",
	"tailsplice upgrade":                          "the same",
	"tailsplice upgrade --binary PATH":            "the same; TestTrouble and TestUpgradeCrashes type it",
}

// typed has the lines that tests have run with success, behind a test's name.
var typed sync.Map

// TestPagesAreTyped: the pages have the commands that are in typedBy or in notTyped, and no others.
func TestPagesAreTyped(t *testing.T) {
	known := map[string]bool{}
	for c := range notTyped {
		known[c] = false
	}
	for _, commands := range typedBy {
		for _, c := range commands {
			known[c] = false
		}
	}
	for _, p := range installPages(t) {
		for _, b := range append(p.Blocks(), p.Commands()...) {
			for line := range strings.Lines(b) {
				if _, ok := known[command(line)]; !ok {
					t.Errorf("no test types %q: have one do so, and name it in typedBy", command(line))
				}
				known[command(line)] = true
			}
		}
	}
	for c, there := range known {
		if !there {
			t.Errorf("neither docs/install.md nor README has %q", c)
		}
	}
}

// command is a line without what a comment says.
func command(line string) string {
	line, _, _ = strings.Cut(line, "  #")
	return strings.TrimSpace(line)
}

func installPages(t *testing.T) []lab.Page {
	t.Helper()
	install, err := lab.ReadPage("docs/install.md")
	if err != nil {
		t.Fatal(err)
	}
	readme, err := lab.ReadPage("README.md")
	if err != nil {
		t.Fatal(err)
	}
	return []lab.Page{install, readme.Section("## Install")}
}

// typesAll has a test fail at its end that has not run all lines that it types by typedBy.
func typesAll(t *testing.T) {
	t.Cleanup(func() {
		if t.Failed() || t.Skipped() {
			return
		}
		for _, c := range typedBy[t.Name()] {
			if !hasRun(t, c) {
				t.Errorf("%q was not typed", c)
			}
		}
	})
}

// ran marks the lines of a script that has succeeded. What runs a block in another form than the page's calls
// it with the page's lines.
func ran(t *testing.T, script string) {
	for line := range strings.Lines(script) {
		typed.Store(testOf(t)+" "+command(line), true)
	}
}

func hasRun(t *testing.T, line string) bool {
	_, ok := typed.Load(testOf(t) + " " + line)
	return ok
}

func testOf(t *testing.T) string {
	test, _, _ := strings.Cut(t.Name(), "/")
	return test
}

// TestTyped: a command is typed once it has been run with success, not once a test has asked for it.
func TestTyped(t *testing.T) {
	if block(t, "make build"); hasRun(t, "make build") {
		t.Error("a block that nobody has run is typed")
	}
	if _, err := typeHere(t.TempDir(), "true\nfalse"); err == nil {
		t.Error("a script whose last line fails succeeds")
	}
	if _, err := typeHere(t.TempDir(), "false\ntrue"); err == nil {
		t.Error("a script goes on after a line that fails")
	}
	if onThisMachine(t, t.TempDir(), "true  # that\n:"); !hasRun(t, "true") || !hasRun(t, ":") {
		t.Error("what has been run is not typed")
	}
}

// block is the block of docs/install.md or of README's installation, or the command in their text, that is a
// text or has it.
func block(t *testing.T, text string) string {
	t.Helper()
	var all []string
	for _, p := range installPages(t) {
		all = append(append(all, p.Blocks()...), p.Commands()...)
	}
	i := slices.Index(all, text)
	if i < 0 {
		i = slices.IndexFunc(all, func(b string) bool { return strings.Contains(b, text) })
	}
	if i < 0 {
		t.Fatalf("neither docs/install.md nor README's installation has %q", text)
	}
	return all[i]
}

// onThisMachine types commands of a page on this machine, whose person is root already.
func onThisMachine(t *testing.T, dir, script string, env ...string) string {
	t.Helper()
	out, err := typeHere(dir, script, env...)
	if err != nil {
		t.Fatalf("%s\n%v\n%s", script, err, out)
	}
	ran(t, script)
	return out
}

func typeHere(dir, script string, env ...string) (string, error) {
	c := exec.Command("bash", "-ec", "sudo() { \"$@\"; }\n"+script)
	c.Dir = dir
	c.Env = append(c.Environ(), env...)
	out, err := c.CombinedOutput()
	return string(out), err
}
