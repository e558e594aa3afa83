package main

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

// user is who the daemon of an image runs as.
const user = 65532

// image is a container image in one tar file, both as an OCI layout (podman, skopeo, crane) and as what
// `docker load` reads. The daemon runs as a user without any right; its configuration has to be mounted.
func (r *release) image(arch string, program []byte) ([]byte, error) {
	passwd := fmt.Sprintf("root:x:0:0::/:/\ntailsplice:x:%d:%d::/var/lib/tailsplice:/\n", user, user)
	group := fmt.Sprintf("root:x:0:\ntailsplice:x:%d:\n", user)
	content, err := r.tar([]file{
		{name: "/usr/bin/tailsplice", mode: 0o755, data: program},
		{name: "/etc/passwd", mode: 0o644, data: []byte(passwd)},
		{name: "/etc/group", mode: 0o644, data: []byte(group)},
		{name: "/etc/ssl/certs/ca-certificates.crt", mode: 0o644, data: authorities()},
		{name: "/etc/tailsplice/", mode: 0o755},
		{name: "/run/tailsplice/", mode: 0o755, owner: user},
		{name: "/var/lib/tailsplice/", mode: 0o700, owner: user},
		{name: "/tmp/", mode: 0o1777},
	})
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(content)), nil
	}, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if image, err = mutate.ConfigFile(image, &v1.ConfigFile{
		OS: "linux", Architecture: arch, Created: v1.Time{Time: r.time}, RootFS: v1.RootFS{Type: "layers"},
		Config: v1.Config{
			User:       fmt.Sprint(user),
			Entrypoint: []string{"/usr/bin/tailsplice"},
			Cmd:        []string{"run"},
			Env:        []string{"PATH=/usr/bin"},
			StopSignal: "SIGTERM",
			Labels: map[string]string{
				"org.opencontainers.image.title":    "tailsplice",
				"org.opencontainers.image.version":  r.version,
				"org.opencontainers.image.created":  r.time.Format(time.RFC3339),
				"org.opencontainers.image.licenses": "BSD-3-Clause",
				"org.opencontainers.image.source":   "https://github.com/tailsplice/tailsplice",
			},
		},
	}); err != nil {
		return nil, err
	}
	if image, err = mutate.Append(image, mutate.Addendum{Layer: layer,
		History: v1.History{Created: v1.Time{Time: r.time}, CreatedBy: "make packages"}}); err != nil {
		return nil, err
	}
	return r.imageFile(image)
}

// imageFile writes the blobs of an image once, and two indexes to them.
func (r *release) imageFile(image v1.Image) ([]byte, error) {
	var files []file
	blob := func(hash v1.Hash, data []byte) string {
		name := "blobs/" + hash.Algorithm + "/" + hash.Hex
		files = append(files, file{name: name, mode: 0o644, data: data})
		return name
	}
	manifest, err := image.RawManifest()
	if err != nil {
		return nil, err
	}
	digest, err := image.Digest()
	if err != nil {
		return nil, err
	}
	blob(digest, manifest)
	config, err := image.RawConfigFile()
	if err != nil {
		return nil, err
	}
	id, err := image.ConfigName()
	if err != nil {
		return nil, err
	}
	configFile, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	docker := tarball.Descriptor{
		Config: blob(id, config), RepoTags: []string{"tailsplice:" + imageTag(r.version)}}
	layers, err := image.Layers()
	if err != nil {
		return nil, err
	}
	for _, l := range layers {
		hash, err := l.Digest()
		if err != nil {
			return nil, err
		}
		packed, err := l.Compressed()
		if err != nil {
			return nil, err
		}
		data, err := io.ReadAll(packed)
		if err != nil {
			return nil, err
		}
		docker.Layers = append(docker.Layers, blob(hash, data))
	}
	for name, v := range map[string]any{
		"oci-layout":    map[string]string{"imageLayoutVersion": "1.0.0"},
		"manifest.json": tarball.Manifest{docker},
		"index.json": v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{{
			MediaType: types.OCIManifestSchema1, Digest: digest, Size: int64(len(manifest)),
			Platform:    configFile.Platform(),
			Annotations: map[string]string{"org.opencontainers.image.ref.name": imageTag(r.version)},
		}}},
	} {
		text, err := json.Marshal(v)
		if err != nil {
			return nil, err
		}
		files = append(files, file{name: name, mode: 0o644, data: text})
	}
	return r.tar(files)
}

// imageTag is a version in the letters that a tag may have.
func imageTag(version string) string {
	tag := []byte(version)
	for i, c := range tag {
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '.' || c == '-') {
			tag[i] = '_'
		}
	}
	return string(tag)
}

// authorities are the roots that Mozilla trusts.
func authorities() []byte {
	var out bytes.Buffer
	for root := range bundle.Roots() {
		if root.Constraint == nil { // one with a constraint would be trusted for more than it is
			pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate})
		}
	}
	return out.Bytes()
}
