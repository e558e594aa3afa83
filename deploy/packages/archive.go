package main

import (
	"archive/tar"
	"bytes"
	"path"
	"slices"
	"strings"
)

// tarball is for machines without dpkg: what belongs into /usr/local, in one folder.
func (r *release) tarball(folder string, program, bom []byte) ([]byte, error) {
	const prefix = "/usr/local"
	list, err := r.files(prefix, program, bom)
	if err != nil {
		return nil, err
	}
	for i, f := range list {
		list[i].name = folder + strings.TrimPrefix(f.name, prefix)
	}
	plain, err := r.tar(list)
	if err != nil {
		return nil, err
	}
	return compress(plain)
}

// tar packs files in the order of their names, with the folders that they are in.
func (r *release) tar(list []file) ([]byte, error) {
	list = slices.Clone(list)
	have := map[string]bool{".": true, "/": true}
	for _, f := range list {
		if dir, ok := strings.CutSuffix(f.name, "/"); ok {
			have[dir] = true // with a mode and an owner of its own
		}
	}
	for _, f := range slices.Clone(list) {
		for d := path.Dir(strings.TrimSuffix(f.name, "/")); !have[d]; d = path.Dir(d) {
			have[d] = true
			list = append(list, file{name: d + "/", mode: 0o755})
		}
	}
	slices.SortFunc(list, func(a, b file) int { return strings.Compare(a.name, b.name) })
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, f := range list {
		h := &tar.Header{Name: strings.TrimPrefix(f.name, "/"), Mode: f.mode, Size: int64(len(f.data)),
			ModTime: r.time, Uname: "root", Gname: "root", Uid: f.owner, Gid: f.owner, Typeflag: tar.TypeReg}
		if f.owner != 0 {
			h.Uname, h.Gname = "", ""
		}
		if strings.HasSuffix(f.name, "/") {
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(f.data); err != nil {
			return nil, err
		}
	}
	err := w.Close()
	return out.Bytes(), err
}
