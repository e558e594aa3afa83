package front

import (
	"cmp"
	"crypto/tls"
	"strings"

	"github.com/tailsplice/tailsplice/userspace/acme"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/tlsterm"
)

// prepareCertificates reads what an https listener shows. The store of a
// listener that goes on is changed by apply, which can't fail; a new listener
// gets a store of its own, without what can't be used if the daemon starts.
func (f *Front) prepareCertificates(l *config.Listener, old *tlsterm.Store, starts bool) (store *tlsterm.Store, managed []*acme.Source, apply func(), err error) {
	var specs []tlsterm.Spec
	for i := range l.Certificates {
		c := &l.Certificates[i]
		switch {
		case c.Files != nil:
			specs = append(specs, tlsterm.Spec{Cert: c.Files.Cert, Key: c.Files.Key})
		case c.Tailscale:
			specs = append(specs, tlsterm.Spec{Name: "tailscale", GetCertificate: f.tailnet.GetCertificate,
				Covers: func(name string) bool { return strings.HasSuffix(name, ".ts.net") }})
		case c.ACME != nil:
			src := f.acme.Source(acmeSection(c.ACME))
			managed = append(managed, src)
			specs = append(specs, tlsterm.Spec{Name: src.String(), GetCertificate: src.GetCertificate, Covers: src.Covers})
		}
	}
	if old != nil {
		apply, err = old.Prepare(specs)
		return old, managed, apply, err
	}
	open := tlsterm.Load
	if starts {
		open = tlsterm.Open
	}
	store, err = open(specs, f.log)
	return store, managed, func() {}, err
}

// prepareACME has the names of all listeners obtained and renewed from apply
// on, which can't fail. One manager serves them all: a challenge may come in by
// another listener than the one that wants the certificate.
func (f *Front) prepareACME(cfg *config.Config) (apply func(), err error) {
	var sections []acme.Section
	for i := range cfg.Listeners {
		for j := range cfg.Listeners[i].Certificates {
			if a := cfg.Listeners[i].Certificates[j].ACME; a != nil {
				sections = append(sections, acmeSection(a))
			}
		}
	}
	return f.acme.Prepare(sections)
}

func acmeSection(a *config.ACME) acme.Section {
	ca := func(directory, root string, eab *config.EAB) acme.CA {
		c := acme.CA{Directory: directory, RootFile: root}
		if eab != nil {
			c.EABKeyID, c.EABMACKey = eab.KeyID, eab.MACKey
		}
		return c
	}
	s := acme.Section{Names: a.Names, OnDemand: a.OnDemand, Email: a.Email, Challenges: a.Challenges,
		Storage: cmp.Or(a.Storage, acme.DefaultStorage), CAs: []acme.CA{ca(a.Directory, a.CA, a.EAB)}}
	if fb := a.Fallback; fb != nil {
		s.CAs = append(s.CAs, ca(fb.Directory, fb.CA, fb.EAB))
	}
	if d := a.DNS; d != nil {
		s.DNS = &acme.Hook{Exec: d.Exec, Timeout: d.Timeout, Wait: d.Wait}
	}
	return s
}

// answeringChallenges makes c answer an authority's hello before any name is
// looked up: the name has no certificate yet.
func (f *Front) answeringChallenges(c *tls.Config) *tls.Config {
	next := c.GetConfigForClient
	c.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if answer := f.acme.ChallengeConfig(hello); answer != nil {
			return answer, nil
		}
		if next == nil {
			return nil, nil
		}
		return next(hello)
	}
	return c
}
