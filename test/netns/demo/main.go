// Command demo shows the whole path at work: a client requests https://example.vsq.cz through each of two
// edges, home, a laptop and a container, with curl and a real browser, and the path that each request took is
// printed from the daemons' logs. It exits 0 only if all of it worked.
//
//	demo                      bring the world up, show it, take it down
//	KEEP=1 demo               leave it up, and say what to type:
//	demo in HOST COMMAND...   run a command on one of its hosts
//	demo prefer|cut|blackhole|restore HOST, demo roam UPLINK
//	demo down                 take it down
//	demo pictures DIRECTORY   draw the README's picture there, and others into build/pictures
//
// `make demo` builds and runs it, and `make pictures` draws. It needs root.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

func main() {
	log.SetOutput(io.Discard) // the lab's STUN server has no other logger; ours is the terminal
	var err error
	switch {
	case len(os.Args) == 3 && os.Args[1] == "pictures":
		err = pictures(os.Args[2])
	case len(os.Args) > 1:
		err = control(os.Args[1:])
	case os.Getenv("KEEP") != "" && os.Getenv("KEEP") != "0":
		err = startKeeper()
	default:
		err = run(nil)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: %v\n", err)
		os.Exit(1)
	}
}

// printer prints progress with the time since the start.
type printer struct {
	begin time.Time
	out   io.Writer
}

func (p printer) step(format string, args ...any) {
	fmt.Fprintf(p.out, "%6.1f s  %s\n", time.Since(p.begin).Seconds(), fmt.Sprintf(format, args...))
}

// run is the demo. keep, if any, is called with the world when the show is over, whether it went well or not,
// and returns when the world may end.
func run(keep func(*lab.World, error) error) error {
	if lacks := lab.Lacks(lab.Options{}, "curl", "chromium", "certutil"); len(lacks) > 0 {
		return fmt.Errorf("this machine lacks %v: `make demo` as root installs it", lacks)
	}
	root, err := lab.Root()
	if err != nil {
		return err
	}
	// tailscaled's first build may be slow
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	defer cancel()
	p := printer{time.Now(), os.Stdout}
	p.step("bringing the world up")
	w, err := lab.New(ctx, lab.Options{Progress: p.step})
	if err != nil {
		return err
	}
	showErr := show(ctx, p, w, root)
	if showErr != nil {
		fmt.Fprint(os.Stderr, w.Logs(15))
	}
	if keep != nil {
		return errors.Join(keep(w, showErr), w.Close())
	}
	p.step("taking the world down")
	if err := errors.Join(showErr, w.Close()); err != nil {
		return err
	}
	p.step("all of it worked, and nothing is left")
	return nil
}

// startSite starts the daemons.
func startSite(ctx context.Context, p printer, w *lab.World, root string) (*site, error) {
	bin := filepath.Join(root, "build", "tailsplice")
	if _, err := os.Stat(bin); err != nil {
		return nil, fmt.Errorf("%w: run `make build`", err)
	}
	if err := w.Home.InstallCertificate(); err != nil {
		return nil, err
	}
	s := &site{w: w, daemons: map[string]*lab.Daemon{}}
	for _, h := range []struct {
		host   *lab.Host
		config string
	}{{w.Laptop, lab.LaptopConfig}, {w.Home, lab.HomeConfig}, {w.EdgeA, lab.EdgeConfig}, {w.EdgeB, lab.EdgeConfig}} {
		d, err := h.host.StartTailsplice(ctx, bin, h.config)
		if err != nil {
			return nil, err
		}
		s.daemons[h.host.Name] = d
	}
	p.step("tailsplice runs on edge-a, edge-b, home and laptop")
	return s, nil
}

// show starts the daemons, and makes every request of the demo.
func show(ctx context.Context, p printer, w *lab.World, root string) error {
	s, err := startSite(ctx, p, w, root)
	if err != nil {
		return err
	}
	if err := s.checkKeys(ctx); err != nil {
		return err
	}
	for _, edge := range w.Edges() {
		if err := w.Prefer(ctx, edge); err != nil {
			return err
		}
		p.step("traffic to %v and %v goes to %s", lab.Anycast4, lab.Anycast6, edge.Name)
		for _, family := range []string{"-4", "-6"} {
			seen, err := s.curl(ctx, family)
			if err != nil {
				return fmt.Errorf("curl %s through %s: %w", family, edge.Name, err)
			}
			p.step("curl %s https://%s/ says 200", family, lab.Site)
			path, err := s.path(ctx, edge, seen)
			if err != nil {
				return err
			}
			printPath(p.out, path, seen)
		}
		png := filepath.Join(root, "build", "demo-"+edge.Name+".png")
		if err := s.browse(ctx, edge, png); err != nil {
			return fmt.Errorf("browser through %s: %w", edge.Name, err)
		}
		p.step("chromium shows the page: %s", png)
	}
	return w.Prefer(ctx, w.EdgeA)
}
