package plan

import (
	"cmp"
	"slices"
	"strings"

	"github.com/tailsplice/tailsplice/userspace/acme"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/dial"
)

// Auto is the configuration's word for a datapath that tailsplice chooses.
const Auto = "auto"

// Needs are what a configuration needs of the daemon that runs it.
type Needs struct {
	Tailnet     bool // tailscaled, for an address, an identity or a certificate
	Docker      bool // dockerd, for a target or for labels
	Transparent bool // connections from clients' own addresses
	Flows       bool // connections that are relayed as they are
	Requests    bool // connections whose requests are read

	Listens    []string            // addresses to listen on that are on the tailnet, such as "tailnet:443"
	Datapaths  map[string]bool     // the words for those that flows are to have
	ACME       []acme.Section      // the certificates of all listeners
	AccessLogs []*config.AccessLog // each file and format once
}

// NeedsOf finds what cfg needs.
func NeedsOf(cfg *config.Config) Needs {
	n := Needs{Datapaths: map[string]bool{}, Tailnet: config.OnTailnet(cfg.Control.Health)}
	identities := func(from []string) { n.Tailnet = n.Tailnet || len(NewPeers(from).patterns) > 0 }
	scheme := func(s string) {
		n.Tailnet = n.Tailnet || s == dial.Tailnet
		n.Docker = n.Docker || s == dial.Docker
	}
	for i := range cfg.Listeners {
		l := &cfg.Listeners[i]
		n.listener(cfg, l)
		identities(l.Allow)
		if l.AcceptProxy != nil {
			identities(l.AcceptProxy.From)
		}
	}
	for l, a := range cfg.Actions() {
		identities(a.Allow)
		n.Transparent = n.Transparent || a.Transparent
		if !l.IsHTTP() && !a.Reject {
			n.Datapaths[wanted(cfg, a)] = true
		}
		for _, to := range a.Forward {
			scheme(to.To.Scheme)
		}
		if a.ForwardAuth != nil {
			s, _, _ := strings.Cut(a.ForwardAuth.Address, ":")
			scheme(s)
		}
	}
	n.Tailnet = n.Tailnet || len(n.Listens) > 0
	return n
}

// listener adds what l needs beside what its actions do.
func (n *Needs) listener(cfg *config.Config, l *config.Listener) {
	n.Requests = n.Requests || l.IsHTTP()
	n.Flows = n.Flows || !l.IsHTTP()
	if takesLabels(l) {
		n.Docker = true
		if !l.IsHTTP() { // their routes make flows, also where l has no other
			n.Datapaths[wanted(cfg, new(config.Action))] = true
		}
	}
	for _, a := range l.Listen {
		if config.OnTailnet(a) {
			n.Listens = append(n.Listens, a)
		}
	}
	for i := range l.Certificates {
		c := &l.Certificates[i]
		n.Tailnet = n.Tailnet || c.Tailscale
		if c.ACME != nil {
			n.ACME = append(n.ACME, ACMESection(c.ACME))
		}
	}
	log := cfg.AccessLogOf(l)
	same := func(a *config.AccessLog) bool { return a.File == log.File && a.Format == log.Format }
	if log != nil && !slices.ContainsFunc(n.AccessLogs, same) {
		n.AccessLogs = append(n.AccessLogs, log)
	}
}

// wanted is the word for the datapath that flows by a are to have.
func wanted(cfg *config.Config, a *config.Action) string {
	return cmp.Or(a.Datapath, cfg.Datapath, Auto)
}

// ACMESection is a as the manager of certificates has it.
func ACMESection(a *config.ACME) acme.Section {
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
