package server

import (
	"fmt"
	"slices"
	"strings"

	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/datapath"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/tlsterm"
)

// Problem is a part of the configuration that does not work now. The others do, and this one is tried again.
type Problem struct {
	Part     string `json:"part"`
	Listener string `json:"listener,omitempty"` // whose part it is; "" for one of several, or of all
	Name     string `json:"name,omitempty"`     // the address, the file, the target
	Problem  string `json:"problem"`            // what is wrong, and what to do about it
}

// The parts of a [Problem].
const (
	PartAddress     = "address"     // that can't be bound
	PartCertificate = "certificate" // whose files can't be used, or that has expired
	PartDefault     = "default"     // that can't be reached, so that its listener is closed
	PartTailnet     = "tailnet"     // this node's addresses are not known for now; those that were are bound
	PartAccessLog   = "access_log"  // whose lines are lost
	PartHealth      = "health"      // control.health, that can't be bound on the tailnet
	PartDatapath    = "datapath"    // that a route names, and flows go by userspace until it is there
	PartTransparent = "transparent" // that targets see this host's address without
	PartContainers  = "containers"  // that dockerd can't be asked for
	PartDeny        = "deny"        // a file not in force as it is; of a listener: it lets nobody in
	PartACME        = "acme"        // a name whose certificate can't be had now
	PartAnnounce    = "announce"    // by which others can't be told
)

var parts = []string{PartAddress, PartCertificate, PartDefault, PartTailnet, PartAccessLog, PartHealth,
	PartDatapath, PartTransparent, PartContainers, PartDeny, PartACME, PartAnnounce}

// Unready says whether the daemon is not ready while there is p, since it can't take connections that it
// should take. A problem of ACME leaves it ready: a load balancer that sends it no connections would keep out
// those by which the authority checks names.
func (p Problem) Unready() bool {
	return p.Part == PartAddress || p.Part == PartCertificate || p.Part == PartDefault ||
		p.Part == PartDeny && p.Listener != ""
}

// String is p in a line.
func (p Problem) String() string {
	what := p.Part
	if p.Name != "" {
		what += " " + p.Name
	}
	if p.Listener != "" {
		what += " of listener " + p.Listener
	}
	return what + ": " + p.Problem
}

// Problems lists what does not work now.
func (srv *Server) Problems() []Problem {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	return srv.problems()
}

type problems []Problem

// add adds what err says, if it is one.
func (p *problems) add(part, listener, name string, err error) {
	if err != nil {
		*p = append(*p, Problem{part, listener, name, err.Error()})
	}
}

// addListener adds what does not work of l, but for its addresses. Server.mu is held.
func (p *problems) addListener(l *listener) {
	service := l.service.Load()
	if l.certs != nil {
		for _, cert := range l.certs.Certificates() {
			if cert.Problem != "" {
				*p = append(*p, certificateProblem(l.name, cert))
			}
		}
	}
	for _, src := range service.Managed {
		for _, a := range src.Status() {
			if a.Problem != "" && !madeUp(a) {
				*p = append(*p, Problem{PartACME, l.name, a.Name, a.Problem})
			}
		}
	}
	if l.announcer != nil {
		_, _, err := l.announcer.State()
		p.add(PartAnnounce, l.name, "", err)
	}
	*p = append(*p, service.deny.problems(l.name)...)
	if r := service.Fallback; r != nil {
		p.add(PartDefault, l.name, r.Written, l.gate.closed())
	}
}

// problems is Problems for who has the lock.
//
// +checklocks:srv.mu
func (srv *Server) problems() []Problem {
	var all problems
	for _, c := range srv.plan.Config.Listeners {
		if len(srv.tailnetAddrs) == 0 {
			for _, a := range c.Listen {
				if config.OnTailnet(a) {
					all.add(PartAddress, c.Name, a, srv.tailnetErr)
				}
			}
		}
		all.addListener(srv.listeners[c.Name])
	}
	for c, err := range srv.unbound {
		all.add(PartAddress, c.listener, c.addr, err)
	}
	if len(srv.tailnetAddrs) > 0 {
		all.add(PartTailnet, "", "", srv.tailnetErr)
	}
	for _, l := range srv.logs {
		all.add(PartAccessLog, "", l.File(), l.Problem())
	}
	for _, file := range srv.denyFiles {
		if !file.IsUnread() {
			all.add(PartDeny, "", file.Name(), file.Problem())
		}
	}
	all.add(PartHealth, "", srv.plan.Config.Control.Health, srv.healthErr)
	for _, d := range srv.datapaths() {
		if h, ok := d.(datapath.Health); ok && waits(d) {
			why, _ := h.Health()
			all = append(all, Problem{PartDatapath, "", d.Name(), why})
		}
	}
	all.add(PartTransparent, "", "", srv.returnPathErr)
	all.add(PartContainers, "", "", srv.containers.Problem())
	slices.SortFunc(all, func(a, b Problem) int { return strings.Compare(a.String(), b.String()) })
	return all
}

func certificateProblem(listener string, cert tlsterm.Info) Problem {
	return Problem{PartCertificate, listener, cert.Source, strings.TrimPrefix(cert.Problem, cert.Source+": ")}
}

// Readiness is whether the daemon can take the connections that it should.
type Readiness struct {
	Format   int  `json:"format_version"` // flow.FormatVersion
	Ready    bool `json:"ready"`
	Draining bool `json:"draining,omitempty"` // it takes no new ones, and ends
	// listeners that an operator has closed; if that is all, it is not ready
	Drained  []string  `json:"drained,omitempty"`
	Problems []Problem `json:"problems,omitempty"` // those that keep it from being ready, and others
}

// Ready says whether the server is ready, and if not what keeps it from that.
func (srv *Server) Ready() Readiness {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	r := Readiness{Format: flow.FormatVersion, Draining: srv.isClosed || srv.isEnding, Problems: srv.problems()}
	var isAll bool
	r.Drained, isAll = srv.drainedNames()
	r.Ready = !r.Draining && !isAll && !slices.ContainsFunc(r.Problems, func(p Problem) bool {
		return p.Unready() && !slices.Contains(r.Drained, p.Listener)
	})
	return r
}

// String is r for people: what it is, and a line for each problem.
func (r Readiness) String() string {
	var b strings.Builder
	switch {
	case r.Draining:
		b.WriteString("not ready: the daemon ends\n")
	case r.Ready:
		b.WriteString("ready\n")
	default:
		b.WriteString("not ready\n")
	}
	if len(r.Drained) > 0 {
		fmt.Fprintf(&b, "drained, until `tailsplice undrain`: %s\n", strings.Join(r.Drained, ", "))
	}
	for _, p := range r.Problems {
		note := ""
		if !p.Unready() {
			note = " (connections are taken all the same)"
		}
		fmt.Fprintf(&b, "%s%s\n", p, note)
	}
	return b.String()
}
