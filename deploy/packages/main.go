// Command packages makes what people install: Debian packages, static tarballs, container images and a bill
// of materials (CycloneDX), for amd64 and arm64. `make packages` runs it. The same tree, version, time and Go
// make the same bytes, whatever the machine.
//
// It has a module of its own, so that its imports stay out of the daemon's.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"flag"
	"fmt"
	"log"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("packages: ")
	var o options
	flag.StringVar(&o.out, "out", "", "the `folder` to put them in")
	flag.StringVar(&o.version, "version", "", "the version, as git describe names it")
	flag.StringVar(&o.arch, "arch", "amd64,arm64", "for which `architectures`, with commas between them")
	roots := flag.String("authorities", "", "write the roots that Mozilla trusts to a `file`, and nothing else")
	flag.Parse()
	if *roots != "" {
		if err := os.WriteFile(*roots, authorities(), 0o644); err != nil {
			log.Fatal(err)
		}
		return
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt)
	defer cancel()
	if err := run(ctx, o); err != nil {
		log.Fatal(err)
	}
}

type options struct{ out, version, arch string }

// release is what the packages of all architectures share.
type release struct {
	options
	repo, work string
	time       time.Time         // of the commit: all files have it
	completion map[string][]byte // by shell
}

func run(ctx context.Context, o options) error {
	if o.out == "" || o.version == "" || flag.NArg() > 0 {
		return fmt.Errorf("name -out and -version, and nothing else: `make packages` does")
	}
	r := release{options: o}
	var err error
	if r.repo, err = filepath.Abs("../.."); err != nil {
		return err
	}
	if r.out, err = filepath.Abs(r.out); err != nil {
		return err
	}
	if r.time, err = commitTime(ctx, r.repo); err != nil {
		return err
	}
	if err := os.MkdirAll(r.out, 0o755); err != nil {
		return err
	}
	if r.work, err = os.MkdirTemp(r.out, "work-"); err != nil {
		return err
	}
	defer os.RemoveAll(r.work)
	if err := r.describe(ctx); err != nil {
		return err
	}
	made := map[string][]byte{}
	for arch := range strings.SplitSeq(r.arch, ",") {
		if err := r.build(ctx, arch, made); err != nil {
			return fmt.Errorf("%s: %w", arch, err)
		}
	}
	if err := forget(r.out); err != nil {
		return err
	}
	var sums strings.Builder
	for _, name := range slices.Sorted(maps.Keys(made)) {
		fmt.Fprintf(&sums, "%x  %s\n", sha256.Sum256(made[name]), name)
		if err := os.WriteFile(filepath.Join(r.out, name), made[name], 0o644); err != nil {
			return err
		}
	}
	fmt.Print(sums.String())
	return os.WriteFile(filepath.Join(r.out, "SHA256SUMS"), []byte(sums.String()), 0o644)
}

// forget removes what an earlier run has made, of another version as a rule: patterns such as those of
// docs/install.md are to find one package.
func forget(out string) error {
	sums, err := os.ReadFile(filepath.Join(out, "SHA256SUMS"))
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	for line := range strings.Lines(string(sums)) {
		_, name, _ := strings.Cut(strings.TrimSpace(line), "  ")
		if name != filepath.Base(name) {
			return fmt.Errorf("%s: %q is not a file there", filepath.Join(out, "SHA256SUMS"), name)
		}
		if err := os.Remove(filepath.Join(out, name)); err != nil && !os.IsNotExist(err) {
			return err
		}
	}
	return nil
}

// commitTime is SOURCE_DATE_EPOCH, or the time of the commit.
func commitTime(ctx context.Context, repo string) (time.Time, error) {
	epoch := os.Getenv("SOURCE_DATE_EPOCH")
	if epoch == "" {
		out, err := output(exec.CommandContext(ctx, "git", "-C", repo, "log", "-1", "--format=%ct"))
		if err != nil {
			return time.Time{}, fmt.Errorf("%w: outside of a git clone, set SOURCE_DATE_EPOCH to the release's time", err)
		}
		epoch = strings.TrimSpace(string(out))
	}
	seconds, err := strconv.ParseInt(epoch, 10, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("SOURCE_DATE_EPOCH is %q: it has to be seconds since 1970", epoch)
	}
	return time.Unix(seconds, 0).UTC(), nil
}

// describe has the daemon, as built for this machine, write its scripts for completion.
func (r *release) describe(ctx context.Context) error {
	host := filepath.Join(r.work, "host")
	if err := r.compile(ctx, host); err != nil {
		return err
	}
	var err error
	r.completion = map[string][]byte{}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if r.completion[shell], err = output(exec.CommandContext(ctx, host, "completion", shell)); err != nil {
			return err
		}
	}
	return nil
}

// compile builds the daemon as `make build` does.
func (r *release) compile(ctx context.Context, out string, env ...string) error {
	c := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false",
		"-ldflags", "-s -w -X main.buildVersion="+r.version, "-o", out, "./cmd/tailsplice")
	c.Dir = r.repo
	c.Env = append(os.Environ(), append([]string{"CGO_ENABLED=0", "GOOS="}, env...)...)
	_, err := output(c)
	return err
}

// build makes all for one architecture, by file name.
func (r *release) build(ctx context.Context, arch string, made map[string][]byte) error {
	bin := filepath.Join(r.work, arch, "tailsplice")
	if err := r.compile(ctx, bin, "GOOS=linux", "GOARCH="+arch); err != nil {
		return err
	}
	program, err := os.ReadFile(bin)
	if err != nil {
		return err
	}
	bom, err := output(exec.CommandContext(ctx, "go", "tool", "cyclonedx-gomod", "bin", "-json", "-std", "-noserial",
		"-notimestamp", "-version", r.version, bin))
	if err != nil {
		return err
	}
	version := strings.TrimPrefix(r.version, "v")
	made["tailsplice_"+version+"_"+arch+".cdx.json"] = bom
	deb := r.debianVersion()
	if made["tailsplice_"+deb+"_"+arch+".deb"], err = r.deb(arch, deb, program, bom); err != nil {
		return err
	}
	name := "tailsplice-" + version + "-linux-" + arch
	if made[name+".tar.gz"], err = r.tarball(name, program, bom); err != nil {
		return err
	}
	made["tailsplice-"+version+"-image-"+arch+".tar"], err = r.image(arch, program)
	return err
}

// output runs a command; an error has what it wrote to standard error.
func output(c *exec.Cmd) ([]byte, error) {
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", strings.Join(c.Args, " "), err, stderr.Bytes())
	}
	return out, nil
}
