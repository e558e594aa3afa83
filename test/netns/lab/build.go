package lab

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

const modulePath = "github.com/tailsplice/tailsplice"

// Root finds the repository above the working directory.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := dir; ; d = filepath.Dir(d) {
		b, err := os.ReadFile(filepath.Join(d, "go.mod"))
		if err == nil && strings.HasPrefix(string(b), "module "+modulePath+"\n") {
			return d, nil
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("%s is not inside a clone of %s", dir, modulePath)
		}
	}
}

// goCommand runs the go tool in a directory of the repository.
func goCommand(ctx context.Context, dir string, env []string, arg ...string) (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	c := exec.CommandContext(ctx, "go", arg...)
	c.Dir = filepath.Join(root, dir)
	c.Env = append(os.Environ(), env...)
	out, err := c.Output()
	if ee, ok := errors.AsType[*exec.ExitError](err); ok {
		return "", fmt.Errorf("go %s: %w\n%s", strings.Join(arg, " "), err, ee.Stderr)
	}
	if err != nil {
		return "", fmt.Errorf("go %s: %w", strings.Join(arg, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}

// built remembers what this process has built already.
var built struct {
	sync.Mutex
	done map[string]bool
}

// buildInto builds a main package of the repository into build/ and returns the binary's path. Go's own cache
// makes a rebuild cheap, so it is done once in each process that asks.
func buildInto(ctx context.Context, dir, pkg, name string, env []string, flags ...string) (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	out := filepath.Join(root, "build", name)
	built.Lock()
	defer built.Unlock()
	if built.done[out] {
		return out, nil
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return "", err
	}
	// A rename, so that tests of other packages never start a half-written binary.
	tmp := fmt.Sprintf("%s.%d", out, os.Getpid())
	defer os.Remove(tmp)
	if _, err := goCommand(ctx, dir, env, append(append([]string{"build", "-o", tmp}, flags...), pkg)...); err != nil {
		return "", err
	}
	if err := os.Rename(tmp, out); err != nil {
		return "", err
	}
	if built.done == nil {
		built.done = map[string]bool{}
	}
	built.done[out] = true
	return out, nil
}

// BuildTailsplice builds the daemon of this repository, with flags as in `go build` (e.g. "-race"), and
// returns its path under build/.
func BuildTailsplice(ctx context.Context, flags ...string) (string, error) {
	name := strings.Join(append([]string{"lab-tailsplice"}, flags...), "")
	return buildInto(ctx, ".", "./cmd/tailsplice", strings.NewReplacer("/", "_", " ", "_").Replace(name), nil, flags...)
}

func buildBlog(ctx context.Context) (string, error) {
	return buildInto(ctx, "test/netns", "./blog", "lab-blog", []string{"CGO_ENABLED=0"}, "-trimpath", "-ldflags=-s -w")
}

// omitted are features of tailscaled that no test uses. Without them it builds in less than half the time,
// which is most of what the first run takes.
const omitted = "ace advertiseexitnode advertiseroutes appconnectors aws bird c2n cachenetmap captiveportal capture " +
	"clientmetrics clientupdate cloud colorable completion conn25 dbus debugportmapper desktop_sessions doctor drive " +
	"flashappliance hujsonconf identityfederation iptables kube linkspeed linuxdnsfight logtail netlog networkmanager " +
	"oauthkey outboundproxy portlist portmapper posture qrcodes relayserver remoteconfig resolved routecheck " +
	"runtimemetrics sdnotify serviceclientprefs ssh synology syslog syspolicy systray taildrop tailnetlock tap tpm " +
	"tundevstats useexitnode usermetrics useroutes wakeonlan webbrowser webclient"

// BuildTailscaled builds the tailscaled of deploy/fly's module, or finds the one built before in
// $XDG_CACHE_HOME/tailsplice: it takes minutes, and so is kept outside the repository, by its and Go's
// version.
func BuildTailscaled(ctx context.Context, progress func(format string, args ...any)) (string, error) {
	tailscaledOnce.Lock()
	defer tailscaledOnce.Unlock()
	if tailscaledOnce.path != "" {
		return tailscaledOnce.path, nil
	}
	path, err := buildTailscaled(ctx, progress)
	if err == nil {
		tailscaledOnce.path = path
	}
	return path, err
}

var tailscaledOnce struct {
	sync.Mutex
	path string
}

// BuildTailscale builds the command line of that tailscaled, and returns its path under build/.
func BuildTailscale(ctx context.Context) (string, error) {
	_, flags, err := tailscaleFlags(ctx)
	if err != nil {
		return "", err
	}
	return buildInto(ctx, tailscaleModule, "tailscale.com/cmd/tailscale", "lab-tailscale", []string{"CGO_ENABLED=0"}, flags...)
}

// tailscaleModule names the version of Tailscale.
const tailscaleModule = "deploy/fly"

// tailscaleFlags are the version of Tailscale, and the flags that its programs are built with.
func tailscaleFlags(ctx context.Context) (version string, flags []string, err error) {
	version, err = goCommand(ctx, tailscaleModule, nil, "list", "-m", "-f", "{{.Version}}", "tailscale.com")
	stamp := strings.TrimPrefix(version, "v")
	return version, []string{"-trimpath", "-tags=ts_omit_" + strings.ReplaceAll(omitted, " ", ",ts_omit_"),
		"-ldflags=-s -w -X tailscale.com/version.longStamp=" + stamp + " -X tailscale.com/version.shortStamp=" + stamp}, err
}

func buildTailscaled(ctx context.Context, progress func(format string, args ...any)) (string, error) {
	version, flags, err := tailscaleFlags(ctx)
	if err != nil {
		return "", err
	}
	goVersion, err := goCommand(ctx, tailscaleModule, nil, "env", "GOVERSION")
	if err != nil {
		return "", err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("where to keep tailscaled: %w", err)
	}
	dir := filepath.Join(cache, "tailsplice")
	bin := filepath.Join(dir, fmt.Sprintf("tailscaled-%s-%s-%08x", version, goVersion,
		crc32.ChecksumIEEE([]byte(strings.Join(flags, " ")))))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	lock, err := os.OpenFile(bin+".lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := flock(ctx, lock); err != nil { // tests of other packages may be building it
		return "", fmt.Errorf("wait for another build of tailscaled: %w", err)
	}
	if _, err := os.Stat(bin); err == nil {
		return bin, nil
	}
	progress("lab: building tailscaled %s: two minutes of two processors, and only once (kept as %s)", version, bin)
	tmp := fmt.Sprintf("%s.%d", bin, os.Getpid())
	defer os.Remove(tmp)
	argv := append(append([]string{"build", "-o", tmp}, flags...), "tailscale.com/cmd/tailscaled")
	if _, err := goCommand(ctx, tailscaleModule, []string{"CGO_ENABLED=0"}, argv...); err != nil {
		return "", err
	}
	return bin, os.Rename(tmp, bin)
}

// flock takes an exclusive lock on f, which lasts until f is closed.
func flock(ctx context.Context, f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		if err := sleep(ctx, pollInterval); err != nil {
			return err
		}
	}
}
