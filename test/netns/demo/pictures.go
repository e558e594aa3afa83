package main

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"html/template"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

//go:embed path.html readme.html terminal.html
var pictureFiles embed.FS

var pictureTemplates = template.Must(template.New("").Funcs(template.FuncMap{
	"list": func(words ...string) []string { return words },
}).ParseFS(pictureFiles, "*.html"))

// Flags of the browser for a picture.
var (
	themes = map[string]string{"dark": "--blink-settings=preferredColorScheme=0", "light": "--blink-settings=preferredColorScheme=1"}
	sizes  = map[string][]string{"desktop": {"--window-size=1280,720"}, "phone": {"--window-size=390,844", "--force-device-scale-factor=2"}}
)

// pictures brings the demo's world up, and draws the README's picture into a directory: path-light.png and
// path-dark.png. Into build/pictures it draws, to be looked at, the README, the error pages, top, and the
// benchmark's charts.
func pictures(docs string) error {
	if lacks := lab.Lacks(lab.Options{}, "curl", "chromium", "certutil", "tmux", "aha", "cmark-gfm", "pngquant"); len(lacks) > 0 {
		return fmt.Errorf("this machine lacks %v: `make pictures` as root installs it", lacks)
	}
	root, err := lab.Root()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	defer cancel()
	dir := filepath.Join(root, "build", "pictures")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if docs, err = filepath.Abs(docs); err != nil {
		return err
	}
	p := printer{time.Now(), os.Stdout}
	w, err := lab.New(ctx, lab.Options{Progress: p.step})
	if err != nil {
		return err
	}
	return errors.Join(draw(ctx, p, w, root, docs, dir), w.Close())
}

func draw(ctx context.Context, p printer, w *lab.World, root, docs, dir string) error {
	var said bytes.Buffer
	p.out = io.MultiWriter(os.Stdout, &said)
	s, err := startSite(ctx, p, w, root)
	if err != nil {
		return err
	}
	if err := w.Prefer(ctx, w.EdgeA); err != nil {
		return err
	}
	p.step("traffic to %v goes to %s", lab.Anycast4, w.EdgeA.Name)
	var v seen
	for range 5 { // the first request waits for each hop to connect to the next
		if v, err = s.curl(ctx, "-4"); err != nil {
			return err
		}
	}
	p.step("curl -4 https://%s/ says 200", lab.Site)
	path, err := s.path(ctx, w.EdgeA, v)
	if err != nil {
		return err
	}
	printPath(p.out, path, v)
	p.out = os.Stdout

	site := "https://" + lab.Site + "/"
	for theme, flag := range themes {
		if _, err := w.Browse(ctx, site, filepath.Join(w.Dir, "page-"+theme+".png"), flag, "--window-size=760,480", "--force-device-scale-factor=2",
			"--host-resolver-rules=MAP "+lab.Site+" "+lab.Anycast4.String()); err != nil {
			return err
		}
	}
	picture, err := s.write("path.html", map[string]any{"Path": path, "Said": strings.Trim(said.String(), "\n"), "Site": site})
	if err != nil {
		return err
	}
	for theme, flag := range themes {
		png := filepath.Join(docs, "path-"+theme+".png")
		if _, err := w.Browse(ctx, picture, png, flag, "--window-size=1000,575", "--force-device-scale-factor=2", "--default-background-color=00000000"); err != nil {
			return err
		}
		if out, err := exec.CommandContext(ctx, "pngquant", "--force", "--output", png, png).CombinedOutput(); err != nil {
			return fmt.Errorf("pngquant: %w: %s", err, out)
		}
		p.step("drawn: %s", png)
	}
	if err := s.drawTop(ctx, p, root, dir); err != nil {
		return err
	}
	for theme, flag := range themes {
		for _, name := range []string{"bench", "bench-short"} {
			png := filepath.Join(dir, name+"-"+theme+".png")
			chart := "file://" + filepath.Join(root, "docs", name+".svg")
			if _, err := w.Browse(ctx, chart, png, flag, "--window-size=900,1200"); err != nil {
				return err
			}
			p.step("drawn: %s", png)
		}
	}

	readme, err := exec.CommandContext(ctx, "cmark-gfm", "--extension", "table", "--unsafe", filepath.Join(root, "README.md")).Output()
	if err != nil {
		return fmt.Errorf("cmark-gfm: %w", err)
	}
	page, err := s.write("readme.html", map[string]any{"Base": template.URL("file://" + root + "/"), "Text": template.HTML(readme)})
	if err != nil {
		return err
	}
	for theme, flag := range themes {
		png := filepath.Join(dir, "readme-"+theme+".png")
		if _, err := w.Browse(ctx, page, png, flag, "--window-size=1012,5000"); err != nil {
			return err
		}
		p.step("drawn: %s", png)
	}

	if err := w.Docker.Remove(ctx, "blog"); err != nil {
		return err
	}
	if err := s.drawErrorPage(ctx, p, dir, "container-gone", "you", "edge-a", "home", "laptop", "container blog"); err != nil {
		return err
	}
	s.daemons["laptop"].Stop(time.Second)
	return s.drawErrorPage(ctx, p, dir, "laptop-stopped", "you", "edge-a", "home", "laptop")
}

// drawErrorPage draws the page that the site shows now, which must name the whole path.
func (s *site) drawErrorPage(ctx context.Context, p printer, dir, name string, path ...string) error {
	site := "https://" + lab.Site + "/"
	dom, err := s.w.Browse(ctx, site, "")
	if err != nil {
		return err
	}
	rest := dom
	for _, hop := range path {
		_, after, found := strings.Cut(rest, "<b>"+hop+"</b>")
		if !found {
			return fmt.Errorf("the error page lacks %s of the path %v:\n%s", hop, path, dom)
		}
		rest = after
	}
	for theme, flag := range themes {
		for size, flags := range sizes {
			png := filepath.Join(dir, name+"-"+size+"-"+theme+".png")
			if _, err := s.w.Browse(ctx, site, png, append(flags, flag)...); err != nil {
				return err
			}
			p.step("drawn: %s", png)
		}
	}
	return nil
}

// drawTop draws `tailsplice top` on an edge that has some flows, on a small and on a large terminal.
func (s *site) drawTop(ctx context.Context, p printer, root, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for i, path := range []string{"sse?n=100000&every=20ms", "bytes?n=1000000000", "bytes?n=1000000000", "sse?n=100000&every=1s"} {
		rate := fmt.Sprintf("%dk", 200*(i+1))
		c := s.w.Client.Command(ctx, "curl", "-sSN", "--limit-rate", rate, "-o", "/dev/null", "https://"+lab.Site+"/"+path)
		if err := c.Start(); err != nil {
			return err
		}
		defer c.Wait()
	}
	for _, size := range [][2]int{{80, 24}, {200, 50}} {
		screen, err := s.terminal(ctx, s.w.EdgeA, size[0], size[1], "KiB/s", filepath.Join(root, "build", "tailsplice"), "top")
		if err != nil {
			return err
		}
		page, err := s.write("terminal.html", template.HTML(screen))
		if err != nil {
			return err
		}
		png := filepath.Join(dir, fmt.Sprintf("top-%dx%d.png", size[0], size[1]))
		// DejaVu Sans Mono at 14 px is 8.43 px wide; a line is 18 px high, and the margin 16 px.
		window := fmt.Sprintf("--window-size=%d,%d", size[0]*843/100+33, size[1]*18+32)
		if _, err := s.w.Browse(ctx, page, png, window); err != nil {
			return err
		}
		p.step("drawn: %s", png)
	}
	cancel() // before Wait
	return nil
}

// terminal runs a command on a host, on a terminal of some columns and rows, until that shows a text, and
// returns the screen as HTML.
func (s *site) terminal(ctx context.Context, h *lab.Host, columns, rows int, text string, command ...string) (string, error) {
	tmux := func(args ...string) ([]byte, error) {
		args = append([]string{"-S", filepath.Join(s.w.Dir, "tmux"), "-f", "/dev/null"}, args...)
		return exec.CommandContext(ctx, "tmux", args...).Output()
	}
	args := append([]string{"set-option", "-g", "status", "off", ";", "set-option", "-g", "default-terminal", "screen-256color", ";",
		"new-session", "-d", "-x", fmt.Sprint(columns), "-y", fmt.Sprint(rows)}, append(h.Enter(), command...)...)
	if _, err := tmux(append([]string{"start-server", ";"}, args...)...); err != nil {
		return "", fmt.Errorf("tmux: %w", err)
	}
	defer tmux("kill-server")
	var screen []byte
	for !bytes.Contains(screen, []byte(text)) {
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("%v doesn't show %q:\n%s", command, text, screen)
		case <-time.After(100 * time.Millisecond):
		}
		var err error
		if screen, err = tmux("capture-pane", "-p", "-e"); err != nil {
			return "", fmt.Errorf("tmux: %v ended: %w", command, err)
		}
	}
	c := exec.CommandContext(ctx, "aha", "--no-header", "--black")
	c.Stdin = bytes.NewReader(screen)
	out, err := c.Output()
	return string(out), err
}

// write executes a template into a file of the world, and returns its URL.
func (s *site) write(name string, data any) (string, error) {
	var b bytes.Buffer
	if err := pictureTemplates.ExecuteTemplate(&b, name, data); err != nil {
		return "", err
	}
	file := filepath.Join(s.w.Dir, name)
	return "file://" + file, os.WriteFile(file, b.Bytes(), 0o644)
}
