package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/goreleaser/nfpm/v2"
	_ "github.com/goreleaser/nfpm/v2/deb"
	"github.com/goreleaser/nfpm/v2/files"
)

// tag is a version, and what git describe adds to that of an earlier commit.
var tag = regexp.MustCompile(
	`^v?(\d[0-9A-Za-z.]*)(?:-([A-Za-z][0-9A-Za-z.]*))??(?:-(\d+)-(g[0-9a-f]+))?(-dirty)?$`)

// debianVersion is the version as dpkg sorts it: v1.2.0-rc.1 is 1.2.0~rc.1, before 1.2.0; the third commit
// after that is 1.2.0+3.gHASH; and a commit without a version before it is 0~TIME.HASH.
func (r *release) debianVersion() string {
	m := tag.FindStringSubmatch(r.version)
	if m == nil || strings.Trim(m[1], "0123456789abcdef") == "" && m[3] == "" {
		return "0~" + r.time.Format("20060102150405") + "." + strings.ReplaceAll(r.version, "-", ".")
	}
	v := m[1]
	if m[2] != "" {
		v += "~" + m[2]
	}
	if m[3] != "" {
		v += "+" + m[3] + "." + m[4]
	}
	return v + strings.Replace(m[5], "-", "+", 1)
}

// deb makes the Debian package.
func (r *release) deb(arch, version string, program, bom []byte) ([]byte, error) {
	list, err := r.files("/usr", program, bom)
	if err != nil {
		return nil, err
	}
	for i, f := range list {
		// Debian's zsh looks there.
		list[i].name = strings.Replace(f.name, "/zsh/site-functions/", "/zsh/vendor-completions/", 1)
	}
	info := &nfpm.Info{
		Name: "tailsplice", Arch: arch, Platform: "linux", Version: version, VersionSchema: "none",
		Section: "net", Priority: "optional", License: "BSD-3-Clause",
		Maintainer: "The tailsplice authors <tailsplice@users.noreply.github.com>",
		Homepage:   "https://github.com/tailsplice/tailsplice",
		Description: "your own Funnel: public connections spliced into your tailnet\n" +
			"It takes public TCP connections on a cheap edge server, decides by the TLS\n" +
			"server name where each belongs, without decrypting, and splices it into a\n" +
			"connection over the tailnet. The same program runs on every hop of the way.",
		MTime: r.time,
	}
	info.Depends = []string{"systemd | systemd-standalone-sysusers | systemd-sysusers"}
	info.Recommends = []string{"ca-certificates"}
	info.Suggests = []string{"tailscale", "logrotate"}
	info.Deb.Compression = "xz"
	info.Scripts.PostInstall, info.Scripts.PreRemove, info.Scripts.PostRemove = "postinst", "prerm", "postrm"
	add := func(f file, kind string) error {
		source := filepath.Join(r.work, arch, "root", f.name)
		if err := os.MkdirAll(filepath.Dir(source), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(source, f.data, 0o644); err != nil {
			return err
		}
		info.Contents = append(info.Contents, &files.Content{Source: source, Destination: f.name, Type: kind,
			FileInfo: &files.ContentFileInfo{Mode: os.FileMode(f.mode), MTime: r.time, Owner: "root", Group: "root"}})
		return nil
	}
	for _, f := range list {
		if err := add(f, files.TypeFile); err != nil {
			return nil, err
		}
	}
	for source, name := range map[string]string{
		r.repo + sample: "/etc/tailsplice/tailsplice.yaml", "logrotate": "/etc/logrotate.d/tailsplice",
	} {
		data, err := os.ReadFile(source)
		if err != nil {
			return nil, err
		}
		if err := add(file{name: name, mode: 0o644, data: data}, files.TypeConfig); err != nil {
			return nil, err
		}
	}
	info = nfpm.WithDefaults(info)
	if err := nfpm.Validate(info); err != nil {
		return nil, err
	}
	if err := nfpm.PrepareForPackager(info, "deb"); err != nil {
		return nil, err
	}
	packager, err := nfpm.Get("deb")
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if err := packager.Package(info, &out); err != nil {
		return nil, fmt.Errorf("deb: %w", err)
	}
	return out.Bytes(), nil
}
