package plan

import (
	"cmp"
	"net/url"
	"slices"
	"strings"

	"github.com/tailsplice/tailsplice/userspace/accesslog"
	"github.com/tailsplice/tailsplice/userspace/acme"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/dial"
)

// Auto is the configuration's word for a datapath that tailsplice chooses.
const Auto = "auto"

// Needs are what a configuration needs of the daemon that runs it, and of the machine.
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
	Things     []Thing             // each once

	listed map[[2]string]bool // kind and name of each of Things
}

// A Thing is something of the machine that a configuration names.
type Thing struct {
	Kind string // one of ThingKinds
	Name string // the path, the address, the name
	At   config.Pos
	Use  Use
	Key  string // with UseCertificate: its file
}

// The kinds of things.
const (
	ThingFile      = "file"
	ThingPort      = "port"
	ThingNode      = "node"
	ThingContainer = "container"
	ThingHost      = "host name"
)

// ThingKinds are all kinds, in the order in which people are told of them.
var ThingKinds = []string{ThingFile, ThingPort, ThingNode, ThingContainer, ThingHost}

// Use is what a file is used for.
type Use int

const (
	UseCompiled    Use = iota // Compile reads it, or it is no file
	UseRead                   // it is read later
	UseWrite                  // it is written, or made
	UseFolder                 // files are made in it
	UseRun                    // it is a program, which PATH may find
	UseSocket                 // it is a unix socket
	UseCertificate            // it is read with its key
	UseKey                    // it is read with its certificate
	UseDeny                   // it has denied prefixes
)

// NeedsOf finds what cfg needs.
func NeedsOf(cfg *config.Config) Needs {
	n := Needs{Datapaths: map[string]bool{}, Tailnet: config.OnTailnet(cfg.Control.Health), listed: map[[2]string]bool{}}
	for _, l := range cfg.Listeners {
		n.listener(cfg, l)
		for a := range l.Actions() {
			n.action(cfg, l, a)
		}
	}
	n.thing(Thing{Kind: ThingPort, Name: cfg.Control.Metrics, At: cfg.Control.At("metrics")})
	n.thing(Thing{Kind: ThingPort, Name: cfg.Control.Health, At: cfg.Control.At("health")})
	n.Tailnet = n.Tailnet || len(n.Listens) > 0
	return n
}

// thing adds a thing, unless it has no name or is there.
func (n *Needs) thing(t Thing) {
	if key := [2]string{t.Kind, t.Name}; t.Name != "" && !n.listed[key] {
		n.listed[key] = true
		n.Things = append(n.Things, t)
	}
}

func (n *Needs) file(name string, at config.Pos, use Use) {
	n.thing(Thing{Kind: ThingFile, Name: name, At: at, Use: use})
}

// identities adds those of the tailnet whom a list of s names.
func (n *Needs) identities(s *config.Section, key string, from []string) {
	for i, who := range from {
		if len(NewPeers(from[i:i+1]).patterns) == 0 {
			continue
		}
		n.Tailnet = true
		if !strings.ContainsAny(who, "@:") { // a user, a tag
			n.thing(Thing{Kind: ThingNode, Name: who, At: s.At(key, i)})
		}
	}
}

// target adds what has to be there to connect to t.
func (n *Needs) target(t dial.Target, at config.Pos) {
	switch t.Scheme {
	case dial.Tailnet:
		n.Tailnet = true
		n.thing(Thing{Kind: ThingNode, Name: t.Host, At: at})
	case dial.Docker:
		n.Docker = true
		n.thing(Thing{Kind: ThingContainer, Name: t.Host, At: at})
	case dial.Unix:
		n.file(t.Path, at, UseSocket)
	default:
		if _, ok := t.Literal(); !ok {
			n.thing(Thing{Kind: ThingHost, Name: t.Host, At: at})
		}
	}
}

// action adds what an action of l needs.
func (n *Needs) action(cfg *config.Config, l *config.Listener, a *config.Action) {
	n.identities(&a.Section, "allow", a.Allow)
	n.Transparent = n.Transparent || a.Transparent
	if !l.IsHTTP() && !a.Reject {
		n.Datapaths[wanted(cfg, a)] = true
	}
	for _, f := range a.Forward {
		n.target(dial.Target(f.To), f.At("to"))
	}
	if u := a.Upstream; u != nil {
		n.file(u.CA, u.At("ca"), UseCompiled)
	}
	if c := a.ClientCertificates; c != nil {
		n.file(c.CA, c.At("ca"), UseCompiled)
	}
	if b := a.BasicAuth; b != nil {
		n.file(b.File, b.At("file"), UseCompiled)
	}
	if fa := a.ForwardAuth; fa != nil {
		u, err := url.Parse(fa.Address)
		if err == nil && (u.Scheme == dial.Tailnet || u.Scheme == dial.Docker) {
			n.target(dial.Target{Scheme: u.Scheme, Host: u.Hostname()}, fa.At("address"))
		}
	}
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
	for i, a := range l.Listen {
		n.thing(Thing{Kind: ThingPort, Name: a, At: l.At("listen", i)})
		if config.OnTailnet(a) {
			n.Listens = append(n.Listens, a)
		}
	}
	for _, d := range l.Deny {
		n.file(d.File, d.At("file"), UseDeny)
	}
	for _, c := range l.Certificates {
		n.certificate(c)
	}
	if log := cfg.AccessLogOf(l); log != nil {
		if log.File != accesslog.Stderr {
			n.file(log.File, log.At("file"), UseWrite)
		}
		same := func(a *config.AccessLog) bool { return a.File == log.File && a.Format == log.Format }
		if !slices.ContainsFunc(n.AccessLogs, same) {
			n.AccessLogs = append(n.AccessLogs, log)
		}
	}
	if a := l.Announce; a != nil {
		if len(a.Up) > 0 { // the folder of its file may be systemd's, and is there once the daemon starts
			n.file(a.Up[0], a.At("up"), UseRun)
			n.file(a.Down[0], a.At("down"), UseRun)
		}
	}
	if l.AcceptProxy != nil {
		n.identities(&l.AcceptProxy.Section, "from", l.AcceptProxy.From)
	}
	n.identities(&l.Section, "allow", l.Allow)
}

func (n *Needs) certificate(c *config.Certificate) {
	n.Tailnet = n.Tailnet || c.Tailscale
	if f := c.Files; f != nil {
		n.thing(Thing{Kind: ThingFile, Name: f.Cert, At: f.At("cert"), Use: UseCertificate, Key: f.Key})
		n.file(f.Key, f.At("key"), UseKey)
	}
	if a := c.ACME; a != nil {
		n.ACME = append(n.ACME, acmeSection(a))
		n.file(a.Storage, a.At("storage"), UseFolder)
		n.file(a.CA, a.At("ca"), UseRead)
		if a.DNS != nil {
			n.file(a.DNS.Exec[0], a.DNS.At("exec"), UseRun)
		}
	}
}

// wanted is the word for the datapath that flows by a are to have.
func wanted(cfg *config.Config, a *config.Action) string {
	return cmp.Or(a.Datapath, cfg.Datapath, Auto)
}

// acmeSection is a as the manager of certificates has it.
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
