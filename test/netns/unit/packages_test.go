package unit

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// releases are two versions, the older one first.
var releases = []string{"v1.0.0-rc.1", "v1.0.0"}

const epoch = "1700000000" // the time of both

// build makes the packages of one version for amd64 alone, from a tree. The result is their folder.
func build(t *testing.T, tree, version string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "out")
	c := exec.Command("go", "run", ".", "-arch", "amd64", "-version", version, "-out", out)
	c.Dir = filepath.Join(tree, "deploy/packages")
	c.Env = append(os.Environ(), "SOURCE_DATE_EPOCH="+epoch)
	if text, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return out
}

// TestPackages installs, upgrades, removes and purges, as docs/install.md says it.
func TestPackages(t *testing.T) {
	options := lab.Options{NoTailnet: true, NoAnycast: true, NoDocker: true}
	lab.Require(t, options, "systemd-nspawn", "mmdebstrap", "nsenter", "pgrep", "make", "git")
	tree, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	typesAll(t)
	old, clone := filepath.Join(t.TempDir(), "build"), cloned(t, tree)
	onThisMachine(t, tree, block(t, "make packages"), "SOURCE_DATE_EPOCH="+epoch,
		"MAKEFLAGS=VERSION="+releases[0]+" BUILD="+relative(t, tree, old))
	folders := []string{filepath.Join(old, "packages"), build(t, tree, releases[1])}
	again := filepath.Join(clone, "build/packages")
	t.Run("the same bytes", func(t *testing.T) { sameBytes(t, folders[0], again) })
	for arch, machine := range map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64} {
		t.Run(arch, func(t *testing.T) { architecture(t, folders[0], arch, machine) })
	}
	w := lab.Start(t, options)
	for i, suite := range []string{"bookworm", "trixie"} {
		t.Run(suite, func(t *testing.T) {
			m := &machine{host: []*lab.Host{w.EdgeA, w.EdgeB}[i], root: debian(t, suite)}
			m.start(t, "--volatile=overlay", "--bind-ro="+folders[0]+":/old", "--bind-ro="+folders[1]+":/new",
				"--bind-ro="+clone+":/clone")
			t.Run("package", func(t *testing.T) { debianPackage(t, m) })
			t.Run("tarball", func(t *testing.T) { tarball(t, m) })
		})
	}
}

// TestBuildNeedsGo: `make build` finds nothing in PATH but go and what every system has.
func TestBuildNeedsGo(t *testing.T) {
	typesAll(t)
	tree, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	path, out := t.TempDir(), t.TempDir()
	for _, name := range []string{"go", "make", "bash", "mkdir"} {
		full, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(full, filepath.Join(path, name)); err != nil {
			t.Fatal(err)
		}
	}
	onThisMachine(t, tree, block(t, "make build"), "PATH="+path, "CC=", "CXX=",
		"MAKEFLAGS=BUILD="+out+" VERSION=v1.0.0")
	version, err := exec.Command(filepath.Join(out, "tailsplice"), "--version").Output()
	if err != nil || !strings.HasPrefix(string(version), "tailsplice v1.0.0 ") {
		t.Errorf("what was built says %q (%v)", version, err)
	}
}

func debianPackage(t *testing.T, m *machine) {
	install := block(t, "apt install")
	m.shell(t, "/old", install)
	m.serves(t, "1.0.0-rc.1")
	if out := m.shell(t, "/", block(t, ":8480/metrics")); !strings.Contains(out, "tailsplice_") {
		t.Errorf("it does not serve its metrics:\n%s", out)
	}
	for _, want := range []string{
		"test $(systemctl is-enabled tailsplice) = enabled",
		"test $(stat -c %U /var/lib/tailsplice /var/log/tailsplice /run/tailsplice | sort -u) = tailsplice",
		"test $(ps -o user= -C tailsplice) = tailsplice",
		"systemd-analyze security --threshold=25 tailsplice", // it fails beyond 2.5
		block(t, "systemd-analyze security"),
		"gzip -t /usr/share/man/man8/tailsplice-run.8.gz /usr/share/man/man5/tailsplice.yaml.5.gz",
		"test -s /usr/share/doc/tailsplice/docs/reference/json.md",
		"test -s /usr/share/bash-completion/completions/tailsplice",
		"test -s /usr/share/doc/tailsplice/examples/edge.yaml",
		"test -d /sys/fs/bpf/tailsplice",
		"logrotate --debug /etc/logrotate.d/tailsplice",
	} {
		m.shell(t, "/", want)
	}

	// A configuration that a person has changed, with an access log.
	m.shell(t, "/", `sed -i 's/8480/8481/' /etc/tailsplice/tailsplice.yaml
echo 'access_log: { file: /var/log/tailsplice/access.log }' >>/etc/tailsplice/tailsplice.yaml`)
	m.shell(t, "/", block(t, "systemctl reload tailsplice"))
	m.page(t, "http://127.0.0.1:8481/metrics")
	m.shell(t, "/", "test -s /var/log/tailsplice/access.log; logrotate --force /etc/logrotate.d/tailsplice")
	m.eventually(t, `curl --fail --silent --output /dev/null http://127.0.0.1:8481/metrics
test -s /var/log/tailsplice/access.log && test -s /var/log/tailsplice/access.log.1`)

	pid := m.run(t, "systemctl", "show", "--value", "--property=MainPID", service)
	if out := m.shell(t, "/new", install); !strings.Contains(out, "has taken over from "+pid) {
		t.Errorf("no new process has taken over from %s:\n%s", pid, out)
	}
	m.page(t, "http://127.0.0.1:8481/metrics")
	m.serves(t, "1.0.0")
	if now := m.run(t, "systemctl", "show", "--value", "--property=MainPID", service); now == pid {
		t.Error("systemd does not follow the process that has taken over")
	}

	pid = m.run(t, "systemctl", "show", "--value", "--property=MainPID", service)
	m.shell(t, "/", block(t, "sudo tailsplice upgrade"))
	m.eventually(t, "test $(systemctl show --value --property=MainPID tailsplice) != "+pid)
	m.page(t, "http://127.0.0.1:8481/metrics")

	m.shell(t, "/", "groupadd --system docker") // as Docker's package does
	m.shell(t, "/", block(t, "adduser tailsplice docker"))
	m.shell(t, "/", `group=$(getent group docker | cut -d: -f3)
grep -qwE "Groups:.*$group" /proc/$(systemctl show --value --property=MainPID tailsplice)/status`)

	// What this version does not take.
	m.shell(t, "/", "sed -i 's/^listeners:/listenres:/' /etc/tailsplice/tailsplice.yaml")
	out := m.shell(t, "/", "apt install --reinstall ./new/tailsplice_*_amd64.deb")
	if !strings.Contains(out, `did you mean "listeners"`) || !strings.Contains(out, "the old one still runs") {
		t.Errorf("it does not say that the configuration is wrong:\n%s", out)
	}
	m.page(t, "http://127.0.0.1:8481/metrics")

	m.shell(t, "/", strings.SplitAfter(block(t, "apt remove"), "\n")[0])
	m.shell(t, "/", `if systemctl is-active tailsplice; then exit 1; fi # set -e does not see a "!"
test ! -e /usr/bin/tailsplice
test -e /etc/tailsplice/tailsplice.yaml
test -e /var/log/tailsplice/access.log`)
	purge := strings.SplitAfter(block(t, "apt remove"), "\n")[1]
	m.shell(t, "/", purge)
	m.shell(t, "/", `test ! -e /etc/tailsplice
test ! -e /etc/logrotate.d/tailsplice
test ! -e /var/log/tailsplice
test ! -e /var/lib/tailsplice
if systemctl cat tailsplice; then exit 1; fi
! find /etc/systemd /var/lib/systemd -name 'tailsplice*' | grep .`)

	_, readme, _ := strings.Cut(block(t, "git clone"), "make packages\n")
	m.shell(t, "/clone", readme)
	m.serves(t, "1.0.0-rc.1")
	m.shell(t, "/", purge)
}

func tarball(t *testing.T, m *machine) {
	m.shell(t, "/new", block(t, "strip-components"))
	m.serves(t, "1.0.0")
	m.shell(t, "/", "systemctl disable --now tailsplice")
}

// serves looks at a machine on which nothing was changed after the installation.
func (m *machine) serves(t *testing.T, version string) {
	t.Helper()
	m.shell(t, "/", "systemctl is-active tailsplice")
	for _, line := range []string{"tailsplice version", "tailsplice --version"} {
		if out := m.shell(t, "/", line); !strings.HasPrefix(out, "tailsplice v"+version+" ") {
			t.Errorf("%s says %q, want version %s", line, out, version)
		}
	}
	if out := m.shell(t, "/", "tailsplice status"); !strings.Contains(out, "v"+version) {
		t.Errorf("the daemon is not version %s:\n%s", version, out)
	}
}

// page gets a page from within the machine, which has to have come through the daemon.
func (m *machine) page(t *testing.T, url string) {
	t.Helper()
	if out := m.shell(t, "/", "curl --fail --silent "+url); !strings.Contains(out, "tailsplice_") {
		t.Errorf("%s: %s", url, out)
	}
}

// shell runs commands as a document names them; each has to succeed.
func (m *machine) shell(t *testing.T, dir, script string) string {
	t.Helper()
	c := m.command(t.Context(), "DEBIAN_FRONTEND=noninteractive", "bash", "-ec", `cd "$1"
apt() { command apt-get --yes "$@"; }
sudo() { "$@"; }
`+m.standIns+script, "bash", dir)
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%s\n%v\n%s\n%s", script, err, out, m.journal())
	}
	ran(t, script)
	return strings.TrimSpace(string(out))
}

// eventually waits until a command succeeds.
func (m *machine) eventually(t *testing.T, script string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if m.command(t.Context(), "sh", "-ec", script).Run() == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within a minute", script)
		}
	}
}

// debian is the root folder of a release, from the mirror that this machine has its packages from. It is kept
// in $XDG_CACHE_HOME/tailsplice: nothing that is booted may write to it.
func debian(t *testing.T, suite string) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	const include = "systemd-sysv,logrotate,procps,curl,adduser"
	dir := filepath.Join(cache, "tailsplice", "debian-"+suite+"-"+strings.ReplaceAll(include, ",", "-"))
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	lock, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	mirror, err := exec.Command("sh", "-c",
		`apt-get indextargets --format '$(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
			awk '$1 == "main" && /debian\/?$/ { print $2; exit }'`).Output()
	if err != nil || len(mirror) == 0 {
		t.Fatalf("no apt source of this machine has Debian's main: %v", err)
	}
	t.Logf("making a root folder of Debian %s once (kept as %s)", suite, dir)
	tmp := fmt.Sprintf("%s.%d", dir, os.Getpid())
	defer os.RemoveAll(tmp)
	out, err := exec.Command("mmdebstrap", "--variant=minbase", "--format=directory",
		"--include="+include, "--keyring=/usr/share/keyrings", suite, tmp, strings.TrimSpace(string(mirror))).CombinedOutput()
	if err != nil {
		t.Fatalf("mmdebstrap: %v\n%s", err, last(string(out), 3000))
	}
	if err := os.Rename(tmp, dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// cloned is a clone of this repository, as its files are now, in which README's block was typed: in another
// place, under another umask, in another time zone. Its one commit is the older release.
func cloned(t *testing.T, tree string) string {
	t.Helper()
	dir := t.TempDir()
	onThisMachine(t, tree, `mkdir "$dir/origin"
git ls-files -z --cached --others --exclude-standard |
	xargs -0 sh -c 'for f; do [ ! -e "$f" ] || echo "$f"; done' sh |
	tar -cf - -T - | tar -C "$dir/origin" -xf -
cd "$dir/origin"
git init --quiet
git add --all
git -c user.name=lab -c user.email=lab@example.org commit --quiet --message=lab
git tag "$tag"`, "dir="+dir, "tag="+releases[0], "GIT_COMMITTER_DATE="+epoch+" +0000")
	script, _, _ := strings.Cut(block(t, "git clone"), "sudo apt-get") // that is for the machine
	onThisMachine(t, dir, "umask 077\n"+script, "TZ=Asia/Tokyo", "LC_ALL=C",
		"GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=url."+dir+"/origin.insteadOf",
		"GIT_CONFIG_VALUE_0=https://github.com/tailsplice/tailsplice")
	return filepath.Join(dir, "tailsplice")
}

// relative is a path as seen from a folder, for make's BUILD.
func relative(t *testing.T, from, path string) string {
	t.Helper()
	rel, err := filepath.Rel(from, path)
	if err != nil {
		t.Fatal(err)
	}
	return rel
}

// sameBytes compares what was built twice.
func sameBytes(t *testing.T, first, second string) {
	a, b := content(t, first), content(t, second)
	if len(a) != 2*4+1 || !slices.Equal(slices.Sorted(maps.Keys(a)), slices.Sorted(maps.Keys(b))) {
		t.Fatalf("%v, and then %v", slices.Sorted(maps.Keys(a)), slices.Sorted(maps.Keys(b)))
	}
	for name := range a {
		if !bytes.Equal(a[name], b[name]) {
			t.Errorf("%s is not the same", name)
		}
	}
	onThisMachine(t, second, "sha256sum --check --strict SHA256SUMS")
	if n := bytes.Count(a["SHA256SUMS"], []byte("\n")); n != len(a)-1 {
		t.Errorf("SHA256SUMS has %d of %d files", n, len(a)-1)
	}
}

func content(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	found, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string][]byte{}
	for _, f := range found {
		if all[f.Name()], err = os.ReadFile(filepath.Join(dir, f.Name())); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// architecture looks at what is for one: the package and the image say so, the program is for it, and the
// bill of materials has what is in that.
func architecture(t *testing.T, dir, arch string, machine elf.Machine) {
	var bom struct {
		Components []struct{ Name, Version string }
	}
	var packed []byte
	for name, data := range content(t, dir) {
		switch {
		case !strings.Contains(name, arch):
		case strings.HasSuffix(name, ".deb"):
			out := onThisMachine(t, dir, "dpkg-deb --field "+name+" Architecture")
			if strings.TrimSpace(out) != arch {
				t.Errorf("%s is for %s", name, out)
			}
		case strings.Contains(name, "-image-"):
			if !bytes.Contains(data, []byte(`"architecture":"`+arch+`"`)) {
				t.Errorf("%s does not say that it is for %s", name, arch)
			}
		case strings.HasSuffix(name, ".cdx.json"):
			if err := json.Unmarshal(data, &bom); err != nil {
				t.Fatal(err)
			}
		case strings.HasSuffix(name, ".tar.gz"):
			packed = data
		}
	}
	unzip := exec.Command("gzip", "-dc")
	unzip.Stdin = bytes.NewReader(packed)
	plain, err := unzip.Output()
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(t.TempDir(), "tailsplice")
	for r := tar.NewReader(bytes.NewReader(plain)); ; {
		h, err := r.Next()
		if err != nil {
			t.Fatalf("the tarball has no bin/tailsplice: %v", err)
		}
		if strings.HasSuffix(h.Name, "/bin/tailsplice") {
			data, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(program, data, 0o755); err != nil {
				t.Fatal(err)
			}
			break
		}
	}
	if f, err := elf.Open(program); err != nil || f.Machine != machine {
		t.Errorf("the program is for another machine: %v", err)
	}
	out, err := exec.Command("go", "version", "-m", program).Output()
	if err != nil {
		t.Fatal(err)
	}
	has := map[string]bool{}
	for _, c := range bom.Components {
		has[c.Name+" "+c.Version] = true
	}
	modules := regexp.MustCompile(`(?m)^\tdep\t(\S+)\t(\S+)`).FindAllStringSubmatch(string(out), -1)
	if len(modules) < 20 {
		t.Fatalf("the program names %d modules", len(modules))
	}
	for _, m := range modules {
		if !has[m[1]+" "+m[2]] {
			t.Errorf("%s %s is in the program, and not in its bill of materials", m[1], m[2])
		}
	}
}
