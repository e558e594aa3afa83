package main

import (
	"bytes"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/BurntSushi/toml"
	"sigs.k8s.io/yaml"
)

// TestPage types what docs/fly.md says, from the first block to the last one, in one shell, beginning in a
// copy of this repository. `make fly` is real but for tailscaled; fly stands for flyctl, and knows the app by
// the folder's fly.toml, as that does. No other program is there: a block that needs one fails. TestEdge of
// test/netns/fly boots the image.
func TestPage(t *testing.T) {
	tree := copyTree(t)
	page, err := os.ReadFile(filepath.Join(tree, "docs/fly.md"))
	if err != nil {
		t.Fatal(err)
	}
	script := ""
	for _, m := range regexp.MustCompile("(?ms)^ *```(\\w*)\n(.*?)^ *```$").FindAllSubmatchIndex(page, -1) {
		line := 1 + bytes.Count(page[:m[0]], []byte("\n"))
		if kind := string(page[m[2]:m[3]]); kind != "sh" {
			t.Errorf("docs/fly.md:%d: a block of %q is typed by nobody", line, kind)
		}
		script += fmt.Sprintf(": docs/fly.md:%d\n%s", line, page[m[4]:m[5]])
	}
	spans := regexp.MustCompile("`(fly [^`]+)`").FindAllStringSubmatch(string(page), -1)
	for _, m := range spans {
		script += fmt.Sprintf(": docs/fly.md, in the text\n%s\n", strings.Join(strings.Fields(m[1]), " "))
	}
	said := filepath.Join(t.TempDir(), "said")
	c := exec.Command("bash", "-euxc", script)
	c.Dir = tree
	c.Env = append(os.Environ(), "PATH="+programs(t), "REAL_GO="+program(t, "go"), "REAL_PATH="+os.Getenv("PATH"),
		"FLY_SAID="+said, "MAKEFLAGS=VERSION=v1.0.0")
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	all, err := os.ReadFile(said)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"apps create", "ips allocate-v4", "ips allocate-v6", "secrets set",
		"deploy", "scale count", "ssh console", "curl"} {
		if !regexp.MustCompile("(?m)^" + want + "( |$)").Match(all) {
			t.Errorf("no block of docs/fly.md has %s:\n%s", want, all)
		}
	}
	regions := map[string]bool{}
	scaled := regexp.MustCompile(`(?m)^scale count 1 --region (\w+)$`)
	for _, m := range scaled.FindAllStringSubmatch(string(all), -1) {
		regions[m[1]] = true
	}
	if app := readApp(t, "fly.toml"); len(regions) != 2 || !regions[app.PrimaryRegion] {
		t.Errorf("machines are made in %v, want two regions, one of them %s",
			slices.Sorted(maps.Keys(regions)), app.PrimaryRegion)
	}
	t.Run("limits", func(t *testing.T) { limits(t, filepath.Join(tree, "build/fly/tailsplice")) })
}

// TestKept: `make fly` again brings what has changed in the tree, but for files with edits, which it names; it
// says what the tree has for them until somebody has looked at that.
func TestKept(t *testing.T) {
	tree := t.TempDir()
	type files map[string]string // by name
	write := func(dir string, f files) {
		t.Helper()
		for name, text := range f {
			if err := os.WriteFile(filepath.Join(tree, dir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.MkdirAll(filepath.Join(tree, "deploy/fly"), 0o755); err != nil {
		t.Fatal(err)
	}
	makefile, err := filepath.Abs("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	made := func(want files, says ...string) string {
		t.Helper()
		c := exec.Command("make", "--no-print-directory", "-f", makefile, "fly-files", "VERSION=v1.0.0")
		c.Dir, c.Env = tree, append(os.Environ(), "MAKEFLAGS=")
		out, err := c.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		for name, text := range want {
			if had, err := os.ReadFile(filepath.Join(tree, "build/fly", name)); err != nil || string(had) != text {
				t.Errorf("%s is %q (%v), want %q\n%s", name, had, err, text, out)
			}
		}
		for _, s := range says {
			if !strings.Contains(string(out), s) {
				t.Errorf("it does not say %q:\n%s", s, out)
			}
		}
		if len(says) == 0 && len(out) > 0 {
			t.Errorf("it says %q", out)
		}
		return string(out)
	}

	write("deploy/fly", files{"Dockerfile": "D1\n", "fly.toml": "F1\n", "edge.yaml": "E1\n"})
	made(files{"Dockerfile": "D1\n", "fly.toml": "F1\n", "edge.yaml": "E1\n"})
	made(files{"Dockerfile": "D1\n", "fly.toml": "F1\n", "edge.yaml": "E1\n"})

	write("build/fly", files{"fly.toml": "app F1\n"})
	write("deploy/fly", files{"edge.yaml": "E2\n"})
	made(files{"fly.toml": "app F1\n", "edge.yaml": "E2\n"}, "build/fly/fly.toml is kept: you have edited it\n")

	write("deploy/fly", files{"fly.toml": "F2\n"})
	said := ""
	for range 2 {
		said = made(files{"fly.toml": "app F1\n", "edge.yaml": "E2\n"},
			"build/fly/fly.toml is kept: you have edited it. But deploy/fly/fly.toml has changed", "-F1\n+F2\n")
	}
	write("build/fly", files{"fly.toml": "app F2\n"})
	done := exec.Command("sh", "-ec", regexp.MustCompile(`: (cp .*)`).FindStringSubmatch(said)[1])
	done.Dir = filepath.Join(tree, "build/fly") // where docs/fly.md has its reader
	if out, err := done.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	made(files{"fly.toml": "app F2\n", "edge.yaml": "E2\n"}, "build/fly/fly.toml is kept: you have edited it\n")

	// A folder of a make fly that did not note what it copied.
	if err := os.RemoveAll(filepath.Join(tree, "build/fly/.copied")); err != nil {
		t.Fatal(err)
	}
	made(files{"fly.toml": "app F2\n", "edge.yaml": "E2\n"}, "or it is of an older tree", "-app F2\n+F2\n")
	write("deploy/fly", files{"edge.yaml": "E3\n"})
	made(files{"fly.toml": "app F2\n", "edge.yaml": "E3\n"}, "or it is of an older tree", "-app F2\n+F2\n")

	if err := os.Remove(filepath.Join(tree, "build/fly/fly.toml")); err != nil {
		t.Fatal(err)
	}
	made(files{"Dockerfile": "D1\n", "fly.toml": "F2\n", "edge.yaml": "E3\n"})
}

// copyTree copies the files that git would have, as they are now.
func copyTree(t *testing.T) string {
	t.Helper()
	tree := filepath.Join(t.TempDir(), "clone")
	c := exec.Command("sh", "-ec", `mkdir "$1"
git ls-files -z --cached --others --exclude-standard |
	xargs -0 sh -c 'for f; do [ ! -e "$f" ] || echo "$f"; done' sh |
	tar -cf - -T - | tar -C "$1" -xf -`, "sh", tree)
	c.Dir = "../.."
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return tree
}

// programs is a folder with all that a block may call.
func programs(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, path := range map[string]string{"go": self, "fly": self, "curl": self,
		"make": program(t, "make"), "mkdir": program(t, "mkdir"), "cp": program(t, "cp"),
		"cmp": program(t, "cmp"), "diff": program(t, "diff")} {
		if err := os.Symlink(path, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func program(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// standIns are what this program is under other names.
var standIns = map[string]func(args []string) error{
	"fly": fly,
	"curl": func(args []string) error {
		if len(args) != 1 || !strings.HasPrefix(args[0], "https://") {
			return fmt.Errorf("curl %q opens no site", args)
		}
		return say("curl " + args[0])
	},
	// go is the real one, but spares tailscaled: the lab builds that once for all its tests.
	"go": func(args []string) error {
		if i := slices.Index(args, "-o"); i > 0 && args[len(args)-1] == "tailscale.com/cmd/tailscaled" {
			return os.WriteFile(args[i+1], nil, 0o755)
		}
		c := exec.Command(os.Getenv("REAL_GO"), args...)
		c.Env = append(os.Environ(), "PATH="+os.Getenv("REAL_PATH")) // what it builds with a C compiler is cached
		c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
		return c.Run()
	},
}

// say notes what a stand-in was told.
func say(line string) error {
	f, err := os.OpenFile(os.Getenv("FLY_SAID"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = fmt.Fprintln(f, line)
	return err
}

// verbs are those of flyctl that docs/fly.md may use, the number of their arguments, and their flags, by
// flyctl's reference. All flags take a value.
var verbs = map[string]struct {
	args  int
	flags []string
	after string // what has to be there
}{
	"apps create":     {args: 1},
	"ips allocate-v4": {after: "apps create"},
	"ips allocate-v6": {after: "apps create"},
	"ips list":        {after: "ips allocate-v4"},
	"secrets set":     {args: 1, after: "apps create"},
	"deploy":          {flags: []string{"--ha"}, after: "secrets set"},
	"scale count":     {args: 1, flags: []string{"--region"}, after: "deploy"},
	"ssh console":     {flags: []string{"-C"}, after: "deploy"},
	"logs":            {after: "deploy"},
}

// fly refuses what flyctl would refuse, or would do to another app than that of the page.
func fly(args []string) error {
	var app app
	if _, err := toml.DecodeFile("fly.toml", &app); err != nil {
		return fmt.Errorf("which app: %w", err)
	}
	name := args[0]
	if _, ok := verbs[name]; !ok && len(args) > 1 {
		name += " " + args[1]
	}
	verb, ok := verbs[name]
	if !ok {
		return fmt.Errorf("fly has no %s here: %q", name, args)
	}
	before, err := os.ReadFile(os.Getenv("FLY_SAID"))
	if verb.after != "" && !regexp.MustCompile("(?m)^"+verb.after+"( |$)").Match(before) {
		return fmt.Errorf("%s comes before %s (%v)", name, verb.after, err)
	}
	var rest []string
	value := map[string]string{}
	for words := args[len(strings.Fields(name)):]; len(words) > 0; words = words[1:] {
		if !strings.HasPrefix(words[0], "-") {
			rest = append(rest, words[0])
			continue
		}
		flag, v, has := strings.Cut(words[0], "=")
		if !slices.Contains(verb.flags, flag) {
			return fmt.Errorf("fly %s has no %s here", name, flag)
		}
		if !has {
			if words = words[1:]; len(words) == 0 {
				return fmt.Errorf("%s is without a value", flag)
			}
			v = words[0]
		}
		value[flag] = v
	}
	if len(rest) != verb.args {
		return fmt.Errorf("fly %s takes %d arguments, and was given %q", name, verb.args, rest)
	}
	switch name {
	case "apps create":
		if rest[0] != app.App {
			return fmt.Errorf("the app %s is created, and fly.toml is that of %s", rest[0], app.App)
		}
	case "secrets set":
		v, _, ok := strings.Cut(rest[0], "=")
		if !ok || !slices.Contains(edgeReads("../../deploy/fly"), v) {
			return fmt.Errorf("edge reads no secret %s", v)
		}
	case "deploy":
		docker, err := os.ReadFile("Dockerfile")
		if err != nil {
			return err
		}
		for _, m := range regexp.MustCompile(`(?m)^COPY (.*) \S+$`).FindAllSubmatch(docker, -1) {
			for file := range strings.FieldsSeq(string(m[1])) {
				if _, err := os.Stat(file); err != nil {
					return err
				}
			}
		}
	case "ssh console":
		words := strings.Fields(value["-C"])
		out, err := exec.Command("./"+words[0], append(words[1:], "--help")...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s in a machine: %v: %s", value["-C"], err, out)
		}
	}
	return say(strings.Join(args, " "))
}

// edgeReads are the variables that this program reads.
func edgeReads(dir string) (names []string) {
	files, _ := filepath.Glob(filepath.Join(dir, "*.go"))
	for _, f := range files {
		text, _ := os.ReadFile(f)
		for _, m := range regexp.MustCompile(`(?:env|Getenv)\("(\w+)"`).FindAllSubmatch(text, -1) {
			names = append(names, string(m[1]))
		}
	}
	return names
}

// app is fly.toml.
type app struct {
	App           string            `toml:"app"`
	PrimaryRegion string            `toml:"primary_region"`
	KillSignal    string            `toml:"kill_signal"`
	KillTimeout   int               `toml:"kill_timeout"`
	Env           map[string]string `toml:"env"`
	Deploy        struct {
		Strategy string `toml:"strategy"`
	} `toml:"deploy"`
	Services []struct {
		Protocol     string `toml:"protocol"`
		InternalPort int    `toml:"internal_port"`
		AutoStop     string `toml:"auto_stop_machines"`
		AutoStart    bool   `toml:"auto_start_machines"`
		Concurrency  struct {
			Type      string `toml:"type"`
			SoftLimit int    `toml:"soft_limit"`
			HardLimit int    `toml:"hard_limit"`
		} `toml:"concurrency"`
		Ports []struct {
			Port     int      `toml:"port"`
			Handlers []string `toml:"handlers"`
			Proxy    struct {
				Version string `toml:"version"`
			} `toml:"proxy_proto_options"`
		} `toml:"ports"`
		Checks []struct {
			Interval duration `toml:"interval"`
			Timeout  duration `toml:"timeout"`
			Grace    duration `toml:"grace_period"`
		} `toml:"tcp_checks"`
	} `toml:"services"`
	VM []struct {
		Size   string `toml:"size"`
		Memory string `toml:"memory"`
	} `toml:"vm"`
}

type duration struct{ time.Duration }

func (d *duration) UnmarshalText(text []byte) (err error) {
	d.Duration, err = time.ParseDuration(string(text))
	return err
}

// readApp reads a fly.toml, of which it has to know every key.
func readApp(t *testing.T, file string) (a app) {
	t.Helper()
	meta, err := toml.DecodeFile(file, &a)
	if err != nil {
		t.Fatal(err)
	}
	if unknown := meta.Undecoded(); len(unknown) > 0 {
		t.Fatalf("this test does not know what %v in %s means", unknown, file)
	}
	return a
}

// edgeYAML is what matters here of edge.yaml.
type edgeYAML struct {
	Listeners []struct {
		Listen      []string
		Mode        string
		WhileDown   string         `json:"while_down"`
		AcceptProxy map[string]any `json:"accept_proxy"`
	}
	Limits struct {
		Memory      string
		Connections int
	}
}

// TestShipped: the fly.toml that people copy fits the edge.yaml beside it, and leaves time to drain.
func TestShipped(t *testing.T) {
	a, e := readApp(t, "fly.toml"), readEdge(t)
	if a.KillSignal != "SIGTERM" || a.KillTimeout != 300 || a.Deploy.Strategy != "bluegreen" {
		t.Errorf("kill_signal is %s, kill_timeout %d, the strategy %s", a.KillSignal, a.KillTimeout,
			a.Deploy.Strategy)
	}
	for name, value := range a.Env {
		if !slices.Contains(edgeReads("."), name) {
			t.Errorf("[env] sets %s, which nothing reads", name)
		}
		if drain, err := time.ParseDuration(value); name == "DRAIN_TIMEOUT" &&
			(err != nil || drain < time.Minute || drain > time.Duration(a.KillTimeout-5)*time.Second) {
			t.Errorf("DRAIN_TIMEOUT is %s (%v), and kill_timeout %d s", value, err, a.KillTimeout)
		}
	}
	if len(a.Services) != len(e.Listeners) {
		t.Fatalf("%d services, and %d listeners", len(a.Services), len(e.Listeners))
	}
	checked := false
	for i, l := range e.Listeners {
		s := a.Services[i]
		listen := []string{fmt.Sprintf(":%d", s.InternalPort)}
		if s.Protocol != "tcp" || !slices.Equal(l.Listen, listen) {
			t.Errorf("a service goes to %s port %d, and the listener has %v", s.Protocol, s.InternalPort,
				l.Listen)
		}
		if len(s.Ports) != 1 || s.Ports[0].Port != s.InternalPort {
			t.Errorf("port %d is reached by %+v", s.InternalPort, s.Ports)
		} else if p := s.Ports[0]; !slices.Equal(p.Handlers, []string{"proxy_proto"}) ||
			p.Proxy.Version != "v2" || l.AcceptProxy == nil {
			t.Errorf("port %d: %+v, accept_proxy %v", s.InternalPort, p, l.AcceptProxy)
		}
		if s.AutoStop != "off" || s.AutoStart {
			t.Errorf("port %d: fly.io stops or starts machines by itself", s.InternalPort)
		}
		// A check makes sense where a listener closes its port; before that, it has to be open once.
		if (len(s.Checks) > 0) != (l.WhileDown == "close") {
			t.Errorf("port %d has %d checks, while_down is %q", s.InternalPort, len(s.Checks), l.WhileDown)
		}
		for _, c := range s.Checks {
			checked = true
			every, most, first := c.Interval.Duration, c.Timeout.Duration, c.Grace.Duration
			if most <= 0 || every < most || first < every {
				t.Errorf("port %d: checks every %v of %v, after %v", s.InternalPort, every, most, first)
			}
		}
	}
	if !checked {
		t.Error("bluegreen needs a check")
	}
}

func readEdge(t *testing.T) (e edgeYAML) {
	t.Helper()
	text, err := os.ReadFile("edge.yaml")
	if err == nil {
		err = yaml.Unmarshal(text, &e)
	}
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// limits: fly.io sends a machine at most as many connections as the daemon takes by its own rule there, and
// its budget is what tailscaled leaves.
func limits(t *testing.T, tailsplice string) {
	a, e := readApp(t, "fly.toml"), readEdge(t)
	hard := 0
	for _, s := range a.Services {
		c := s.Concurrency
		// By default they are 20, and none.
		if c.Type != "connections" || c.SoftLimit <= 0 || c.SoftLimit >= c.HardLimit {
			t.Errorf("port %d: %+v", s.InternalPort, c)
		}
		hard += c.HardLimit
	}
	if hard > e.Limits.Connections {
		t.Errorf("fly.io sends up to %d connections, limits.connections is %d", hard, e.Limits.Connections)
	}
	if e.Limits.Memory == "" {
		t.Fatal("edge.yaml has no limits.memory: by default it is 5/8 of the machine, which is tailscaled's, too")
	}
	if fit := fits(t, tailsplice, e.Limits.Memory); e.Limits.Connections > fit {
		t.Errorf("limits.connections is %d, and %d fit limits.memory", e.Limits.Connections, fit)
	}
	// Of 256 MB a machine has about 215 MiB. tailscaled's heap is held below its GOMEMLIMIT as a rule.
	text, err := os.ReadFile("main.go")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`"TAILSCALED_GOMEMLIMIT", "(\d+)MiB"`).FindSubmatch(text)
	if len(a.VM) != 1 || a.VM[0].Memory != "256mb" || m == nil {
		t.Fatalf("machines are %+v, and tailscaled's share is %q", a.VM, m)
	}
	var tailscaled, ours int
	fmt.Sscan(string(m[1]), &tailscaled)
	if n, err := fmt.Sscanf(e.Limits.Memory, "%dMiB", &ours); n != 1 || tailscaled+ours > 190 {
		t.Errorf("tailscaled has %d MiB, and tailsplice %s (%v)", tailscaled, e.Limits.Memory, err)
	}
}

// fits is how many connections the daemon takes with a budget: it says so where it is told to take more.
func fits(t *testing.T, tailsplice, memory string) (n int) {
	t.Helper()
	dir := t.TempDir()
	config := filepath.Join(dir, "tailsplice.yaml")
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free.Close()
	text := fmt.Sprintf(`listeners: [ { listen: [%q], mode: tcp, default: { reject: true } } ]
limits: { connections: 1000000, memory: %s }
control: { socket: %q }
`, free.Addr(), memory, filepath.Join(dir, "socket"))
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	c := exec.Command(tailsplice, "run", "--config", config)
	out, err := c.StderrPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { c.Process.Kill(); c.Wait() }()
	line := regexp.MustCompile(`limits\.memory allows.*"connections_lowered_to":(\d+)`)
	var all bytes.Buffer
	for buf := make([]byte, 4096); ; {
		k, err := out.Read(buf)
		all.Write(buf[:k])
		if m := line.FindSubmatch(all.Bytes()); m != nil {
			fmt.Sscan(string(m[1]), &n)
			return n
		}
		if err != nil || bytes.Contains(all.Bytes(), []byte(`"tailsplice runs"`)) {
			t.Fatalf("the daemon does not say how many connections fit (%v):\n%s", err, all.Bytes())
		}
	}
}
