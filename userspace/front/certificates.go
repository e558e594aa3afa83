package front

import (
	"crypto/tls"
	"strings"

	"github.com/tailsplice/tailsplice/userspace/acme"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/plan"
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
			src := f.acme.Source(plan.ACMESection(c.ACME))
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
