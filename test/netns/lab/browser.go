package lab

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
)

// Browse opens a page in a real headless browser on the client, which trusts the lab's CA. It returns the
// page as the browser has it after its scripts have run, or, if screenshot names a file, takes a PNG instead.
// A browser shows its error pages as readily: look at what it brought. More flags of the browser win over
// those that it gets here.
func (w *World) Browse(ctx context.Context, url, screenshot string, flags ...string) (dom string, err error) {
	home := filepath.Join(w.Client.Dir, "home")
	if err := w.browserTrust(ctx, filepath.Join(home, ".pki/nssdb")); err != nil {
		return "", fmt.Errorf("lab: trust the lab's CA: %w", err)
	}
	what := "--dump-dom"
	if screenshot != "" {
		what = "--screenshot=" + screenshot
	}
	args := []string{"--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
		"--no-first-run", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
		"--user-data-dir=" + filepath.Join(home, "chromium"), "--window-size=900,620"}
	c := w.Client.Command(ctx, "chromium", append(append(args, flags...), what, url)...)
	var stdout, stderr bytes.Buffer
	c.Stdout, c.Stderr = &stdout, &stderr
	if err := c.Run(); err != nil {
		return "", fmt.Errorf("lab: browse %s: %w: %s", url, err, stderr.String())
	}
	return stdout.String(), nil
}

// browserTrust puts the lab's CA into the browser's own store, once.
func (w *World) browserTrust(ctx context.Context, db string) error {
	if _, err := os.Stat(db); err == nil {
		return nil
	}
	if err := os.MkdirAll(db, 0o700); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"-N", "--empty-password"},
		{"-A", "-n", "lab", "-t", "C,,", "-i", filepath.Join(w.Client.Dir, "ca.pem")},
	} {
		if _, err := w.Client.Command(ctx, "certutil", append([]string{"-d", "sql:" + db}, args...)...).Output(); err != nil {
			return err
		}
	}
	return nil
}
