package plan

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tailsplice/tailsplice/userspace/auth"
	"github.com/tailsplice/tailsplice/userspace/balance"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/health"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

// Rule is one route, or the default: which connections it takes, where it leads
// them, and what it asks of them.
type Rule struct {
	Name string // how people find it in the config: "*.vsq.cz", "notes.vsq.cz/api/", "default"
	Match
	Target
	Policy
	HTTP  *HTTP  // of http(s) listeners only, all of them
	Label *Label // where a container's labels made it

	Several []*Rule // one for each target, where it has more than one
}

// Match is which connections a rule takes.
type Match struct {
	Patterns []string // names; the default has none
	ALPN     []string // protocols, of which a hello has one; none: all
}

// Target is where a rule leads.
type Target struct {
	To          dial.Target       // the first
	Literal     netip.AddrPort    // To where it needs no lookup
	Written     string            // as the config has it
	All         []*config.Forward // with their weights
	Dialer      *dial.Dialer
	Health      *balance.Health // what connections have shown of one of several
	Check       *health.Check   // what checks one, or the only one; nil: nothing does
	BySource    bool            // a client has the same of several each time
	SendProxy   bool
	Transparent bool // from the client's own address
}

// Policy is what a rule asks, and which datapath it gives flows.
type Policy struct {
	Reject   bool
	Allow    *Peers        // nil: everybody
	Asks     []string      // what else a client must satisfy, for people
	Datapath string        // the config's word; "" where requests are served
	Hold     time.Duration // how long connections and requests wait for a target; 0: they don't
	Wake     *config.Wake  // how a target is woken; nil: it is not

	ResetDown bool // flows of a target end when its checks find it down
}

// HTTP is what a rule says of requests.
type HTTP struct {
	Match vhost.Match
	Route *vhost.Route  // nil: it rejects
	Users *auth.Users   // of basic_auth
	Auth  *auth.Forward // of forward_auth
	Asked string        // its address, as the config has it
}

// Label is whose labels made a rule.
type Label struct {
	Container string
	State     string          // running, stopped or removed
	Current   context.Context // ends when the containers have changed
}

// Source says where the rule comes from.
func (r *Rule) Source() string {
	if r.Label != nil {
		return "container " + r.Label.Container
	}
	return "config"
}

// IsPlain says that r's target needs nothing but to be dialled.
func (r *Rule) IsPlain() bool { return r.Literal.IsValid() && !r.Transparent }

func (r *Rule) path() string {
	if r.HTTP == nil {
		return ""
	}
	return r.HTTP.Match.Path
}

func (r *Rule) asksCertificate() bool {
	return r.HTTP != nil && r.HTTP.Route != nil && r.HTTP.Route.ClientCAs != nil
}

// accepts says whether a hello with these protocols may take the rule.
func (r *Rule) accepts(alpn []string) bool {
	return len(r.ALPN) == 0 || slices.ContainsFunc(alpn, func(p string) bool {
		// An authority that validates a name offers nothing else (RFC 8737 section 3). A client that does may
		// choose a protocol that is for everybody, and must not get around the guards of that.
		return slices.Contains(r.ALPN, p) && (p != acmeTLS || len(alpn) == 1)
	})
}

// holdToWake is how long those wait who wake a target, unless the configuration says it.
const holdToWake = 30 * time.Second

// acmeTLS is the protocol of authorities that validate a name.
const acmeTLS = "acme-tls/1"

// fill gives r, of which name, match and label are known, what a says to do.
func (p *Plan) fill(r *Rule, l *config.Listener, a *config.Action) error {
	r.Reject = a.Reject
	if r.HTTP != nil {
		r.HTTP.Match.AnyCase = a.Reject || len(asks(a)) > 0
	}
	if a.Reject {
		return nil
	}
	r.Target = Target{To: dial.Target(a.Target()), Written: written(a), All: a.Forward, Dialer: p.deps.Dialer,
		SendProxy: a.SendProxy != "", Transparent: a.Transparent}
	r.Literal, _ = r.To.Literal()
	if r.Label != nil { // by its name: its ids say nothing to people
		r.Dialer = p.deps.LabelDialer
		r.Written = config.Target{Scheme: r.To.Scheme, Host: r.Label.Container, Port: r.To.Port}.String()
	}
	r.BySource = a.Balance == "source"
	r.Allow, r.Asks, r.Hold, r.Wake = peersOrAll(a.Allow), asks(a), a.Hold, a.Wake
	if r.Wake != nil && r.Hold == 0 {
		r.Hold = holdToWake
	}
	if r.HTTP != nil {
		return p.fillHTTP(r, l, a)
	}
	r.Datapath = wanted(p.Config, a)
	if p.deps.Datapath != nil {
		if err := p.deps.Datapath(r.Datapath); err != nil {
			return p.Config.Errorf(a.At("datapath"), "%v", err)
		}
	}
	r.ResetDown = a.OnDown == "reset"
	for _, to := range a.Forward {
		one := r.withTarget(to)
		one.Check = p.check(l, one, a, nil)
		r.addTarget(one, new(balance.Health))
	}
	return nil
}

func peersOrAll(from []string) *Peers {
	if len(from) == 0 {
		return nil
	}
	return NewPeers(from)
}

// written is where a rule leads, as the config has it.
func written(a *config.Action) string {
	if a.Redirect != nil {
		return "redirect " + a.Redirect.To
	}
	var all []string
	for _, f := range a.Forward {
		all = append(all, f.To.String())
	}
	return strings.Join(all, ", ")
}

// asks lists what a may ask of a client, for people.
func asks(a *config.Action) (all []string) {
	if len(a.Allow) > 0 {
		all = append(all, "allow "+strings.Join(a.Allow, ", "))
	}
	if a.BasicAuth != nil {
		all = append(all, "basic_auth")
	}
	if a.ForwardAuth != nil {
		all = append(all, "forward_auth "+a.ForwardAuth.Address)
	}
	if a.ClientCertificates != nil {
		all = append(all, "client_certificates")
	}
	return all
}
