package main

import (
	"bytes"
	"compress/gzip"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// sample is the configuration that a package installs. `tailsplice init` replaces it, and nothing else,
// unasked.
const sample = "/cmd/tailsplice/installed.yaml"

// file is one of a package.
type file struct {
	name  string // absolute
	mode  int64
	data  []byte
	owner int
}

// files are those of the daemon that belong below a prefix, such as /usr.
func (r *release) files(prefix string, program, bom []byte) ([]file, error) {
	unit, err := os.ReadFile("tailsplice.service")
	if err != nil {
		return nil, err
	}
	users, err := os.ReadFile("sysusers.conf")
	if err != nil {
		return nil, err
	}
	doc := prefix + "/share/doc/tailsplice"
	files := []file{
		{name: prefix + "/bin/tailsplice", mode: 0o755, data: program},
		{name: prefix + "/lib/systemd/system/tailsplice.service", mode: 0o644,
			data: bytes.ReplaceAll(unit, []byte("@PREFIX@"), []byte(prefix))},
		{name: prefix + "/lib/sysusers.d/tailsplice.conf", mode: 0o644, data: users},
		{name: prefix + "/share/bash-completion/completions/tailsplice", mode: 0o644, data: r.completion["bash"]},
		{name: prefix + "/share/zsh/site-functions/_tailsplice", mode: 0o644, data: r.completion["zsh"]},
		{name: prefix + "/share/fish/vendor_completions.d/tailsplice.fish", mode: 0o644, data: r.completion["fish"]},
		{name: doc + "/sbom.cdx.json", mode: 0o644, data: bom},
	}
	for _, from := range []string{"README.md", "ARCHITECTURE.md", "SECURITY.md", "docs", "examples", "deploy/grafana",
		"deploy/prometheus"} {
		err := filepath.WalkDir(filepath.Join(r.repo, from), func(source string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			text, err := os.ReadFile(source)
			if err != nil {
				return err
			}
			name := path.Join(doc, strings.TrimPrefix(source, r.repo))
			if page, ok := strings.CutPrefix(name, doc+"/docs/man/"); ok {
				name = prefix + "/share/man/man" + strings.TrimPrefix(path.Ext(page), ".") + "/" + page + ".gz"
				if text, err = compress(text); err != nil {
					return err
				}
			}
			files = append(files, file{name: name, mode: 0o644, data: text})
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	for source, name := range map[string]string{r.repo + "/LICENSE": "copyright", r.repo + sample: "tailsplice.yaml"} {
		text, err := os.ReadFile(source)
		if err != nil {
			return nil, err
		}
		files = append(files, file{name: path.Join(doc, name), mode: 0o644, data: text})
	}
	return files, nil
}

// compress is gzip without a name or a time.
func compress(data []byte) ([]byte, error) {
	var out bytes.Buffer
	w, err := gzip.NewWriterLevel(&out, gzip.BestCompression)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(data); err != nil {
		return nil, err
	}
	err = w.Close()
	return out.Bytes(), err
}
