package plan

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/container"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

// goneFor is how long a container that was removed still answers 503 for its names: `docker compose up`
// removes one before it makes the next, and until then the name must not lead elsewhere.
const goneFor = time.Minute

// LabelProblem is what keeps a container's labels, or a part of them, from making a route.
type LabelProblem struct {
	Container string `json:"container"`
	Label     string `json:"label"`
	Listener  string `json:"listener,omitempty"` // "": on all
	Problem   string `json:"problem"`
}

// Labels is what the labels of containers make of the listeners of a plan. It is immutable.
type Labels struct {
	Problems []LabelProblem

	holders map[claim]string // key of the candidate that has it
	seen    []container.Labelled
	gone    map[string]goneContainer // by id
	current context.Context
	end     context.CancelFunc
}

func newLabels(seen []container.Labelled) *Labels {
	n := &Labels{holders: map[claim]string{}, gone: map[string]goneContainer{}, seen: seen}
	n.current, n.end = context.WithCancel(context.Background())
	return n
}

// End says that others have taken the place of n: dials by its rules begin anew.
func (n *Labels) End() { n.end() }

// Forgets is how long it is until the next removed container is forgotten, 0 if none is left.
func (n *Labels) Forgets() (again time.Duration) {
	for _, g := range n.gone {
		if left := max(time.Until(g.at.Add(goneFor)), time.Millisecond); again == 0 || left < again {
			again = left
		}
	}
	return again
}

// claim is what only one of several containers can have.
type claim struct{ listener, host, path string }

type goneContainer struct {
	container.Labelled
	at time.Time
}

// candidate is a container, or several of one Compose service with the same
// labels, that wants routes to itself.
type candidate struct {
	key     string // the same over restarts of its containers
	name    string
	ids     []string
	state   string // running, stopped or removed
	created time.Time
	labels  config.Labels
}

// ListLabelled returns the containers with labels, if the plan has a listener that takes them: so that the
// first request finds its route. Without an answer they come later; what follows them says why.
func (p *Plan) ListLabelled(ctx context.Context) []container.Labelled {
	if slices.ContainsFunc(p.Config.Listeners, takesLabels) {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		p.deps.Containers.List(ctx)
	}
	return p.deps.Containers.Labelled()
}

func takesLabels(l *config.Listener) bool { return l.Docker != nil && l.Docker.Enabled }

// WithLabels returns the plan with the routes of these labels in place of others.
// before is what the labels made until now, nil at first.
func (p *Plan) WithLabels(before *Labels, seen []container.Labelled) *Plan {
	if p.base != nil {
		p = p.base
	}
	if before == nil {
		before = p.Labels
	}
	next := *p
	next.base, next.Services, next.Labels = p, maps.Clone(p.Services), newLabels(seen)
	next.addLabels(before)
	return &next
}

// addLabels adds the routes of p.Labels to the services that take them.
func (p *Plan) addLabels(before *Labels) {
	next := p.Labels
	if !slices.ContainsFunc(p.Config.Listeners, takesLabels) {
		return
	}
	there := map[string]bool{}
	for _, c := range next.seen {
		there[c.ID] = true
	}
	for _, c := range before.seen {
		next.gone[c.ID] = goneContainer{c, time.Now()}
	}
	maps.Copy(next.gone, before.gone)
	maps.DeleteFunc(next.gone, func(id string, g goneContainer) bool { return there[id] || time.Since(g.at) >= goneFor })

	all := next.candidates()
	fits := map[string]bool{}
	for _, l := range p.Config.Listeners {
		base := p.Services[l.Name]
		if base == nil || !takesLabels(l) {
			continue
		}
		taken := map[claim]string{} // by whom
		for _, r := range base.Rules {
			for _, name := range r.Patterns {
				taken[claim{l.Name, name, trimmed(r.path())}] = configured
			}
		}
		var mine []candidate
		for _, c := range all {
			if c.labels.Fits(l.Mode) {
				mine, fits[c.key] = append(mine, c), true
			}
		}
		p.Services[l.Name] = base.withRules(p.labelRules(l, mine, taken, before))
	}
	for _, c := range all {
		if !fits[c.key] {
			next.problem(c.name, "tls", "", "no listener for it has docker enabled: without this label http and https listeners take it, with true only https, with false only http, with passthrough only sni")
		}
	}
}

// configured is the holder of a claim that no container can have.
const configured = "a configured route"

func (n *Labels) problem(container, key, listener, format string, args ...any) {
	n.add(LabelProblem{Container: container, Label: config.LabelPrefix + key, Listener: listener, Problem: fmt.Sprintf(format, args...)})
}

func (n *Labels) add(p LabelProblem) {
	if !slices.Contains(n.Problems, p) {
		n.Problems = append(n.Problems, p)
	}
}

// candidates reads the labels of all containers, and joins replicas.
func (n *Labels) candidates() []candidate {
	var all []candidate
	add := func(c container.Labelled, state string) {
		if state == "removed" && slices.ContainsFunc(all, func(o candidate) bool { return o.key == candidateKey(c) }) {
			return // it was replaced
		}
		labels, errs := config.ParseLabels(c.Labels)
		if state != "removed" { // said already
			for _, e := range errs {
				n.add(LabelProblem{Container: c.Name, Label: e.Label, Problem: e.Problem})
			}
		}
		if len(errs) > 0 {
			return
		}
		if c.HostNetwork {
			n.problem(c.Name, "host", "", "the container is in the host's network, where a port may be anybody's: write a route with forward: 127.0.0.1:PORT")
			return
		}
		if labels.Port == 0 {
			if len(c.Ports) != 1 {
				n.problem(c.Name, "port", "", "it is missing, and the container exposes %s: say which one the routes lead to", portList(c.Ports))
				return
			}
			labels.Port = c.Ports[0]
		}
		key := candidateKey(c)
		i := slices.IndexFunc(all, func(o candidate) bool { return o.key == key })
		switch {
		case i < 0:
			all = append(all, candidate{key: key, name: c.Name, ids: []string{c.ID}, state: state, created: c.Created, labels: labels})
		case all[i].state == state && all[i].labels.Port == labels.Port:
			all[i].ids = append(all[i].ids, c.ID)
			all[i].name += "," + c.Name
		case state == "running": // another image of the service, or one that is not stopped
			all[i] = candidate{key: key, name: c.Name, ids: []string{c.ID}, state: state, created: c.Created, labels: labels}
		}
	}
	for _, c := range n.seen {
		state := "stopped"
		if c.Running {
			state = "running"
		}
		add(c, state)
	}
	for _, id := range slices.Sorted(maps.Keys(n.gone)) {
		add(n.gone[id].Labelled, "removed")
	}
	return all
}

// candidateKey is the same for the replicas of a Compose service that have the
// same labels, and for their successors.
func candidateKey(c container.Labelled) string {
	if c.Replicas == "" {
		return c.ID
	}
	return c.Replicas + fmt.Sprint(c.Labels)
}

func portList(ports []uint16) string {
	if len(ports) == 0 {
		return "none"
	}
	return strings.Trim(fmt.Sprint(ports), "[]")
}

// labelRules makes the rules of one listener: of those that want the same name and path one that runs goes
// before one that does not, then whoever has it already, then the older one.
func (p *Plan) labelRules(l *config.Listener, all []candidate, taken map[claim]string, before *Labels) []*Rule {
	next := p.Labels
	order := map[string]int{"running": 0, "stopped": 1, "removed": 2}
	slices.SortStableFunc(all, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(order[a.state], order[b.state]), a.created.Compare(b.created), strings.Compare(a.name, b.name))
	})
	// Whoever has a claim and still runs keeps it.
	kept := map[claim]string{}
	for _, c := range all {
		for _, host := range c.labels.Host {
			if k := (claim{l.Name, host, trimmed(c.labels.Path)}); before.holders[k] == c.key && c.state == "running" {
				kept[k] = c.key
			}
		}
	}
	var rules []*Rule
	for _, c := range all {
		var hosts []string
		for _, host := range c.labels.Host {
			k := claim{l.Name, host, trimmed(c.labels.Path)}
			by, dup := taken[k]
			if holder := kept[k]; !dup && holder != "" && holder != c.key {
				i := slices.IndexFunc(all, func(o candidate) bool { return o.key == holder })
				by, dup = "container "+all[i].name, true
			}
			guard := guarded(p.Config, l, host, c.labels.Path)
			switch {
			case !l.Docker.Allows(host):
				next.problem(c.name, "host", l.Name, "%q is not among docker.hosts of the listener", host)
			case dup && (c.state == "running" || by == configured):
				next.problem(c.name, "host", l.Name, "%q belongs to %s already", host+c.labels.Path, by)
			case dup:
			case guard != "":
				next.problem(c.name, "host", l.Name, "%q is a part of %s", host+c.labels.Path, guard)
			default:
				hosts = append(hosts, host)
				taken[k], next.holders[k] = "container "+c.name, c.key
			}
		}
		if len(hosts) == 0 {
			continue
		}
		r, err := p.labelRule(l, hosts, &c)
		if err != nil {
			next.problem(c.name, "host", l.Name, "%v", err)
			continue
		}
		rules = append(rules, r)
	}
	return rules
}

// labelRule leads to the candidate's own containers, by their ids: whatever
// they are called, and whatever their labels say.
func (p *Plan) labelRule(l *config.Listener, hosts []string, c *candidate) (*Rule, error) {
	target := config.Target{Scheme: dial.Docker, Host: strings.Join(c.ids, ","), Port: c.labels.Port}
	r := &Rule{Name: strings.Join(hosts, ",") + c.labels.Path, Match: Match{Patterns: hosts},
		Label: &Label{Container: c.name, State: c.state, Current: p.Labels.current}}
	if l.IsHTTP() {
		r.HTTP = &HTTP{Match: vhost.Match{Path: c.labels.Path}}
	}
	a := &config.Action{Forward: []*config.Forward{{To: target, Weight: 1}}}
	switch {
	case c.labels.Wake && l.Docker.Wake:
		a.Wake = &config.Wake{Docker: true, Idle: c.labels.Idle}
	case c.labels.Wake:
		p.Labels.problem(c.name, "wake", l.Name, "the listener does not let labels wake containers: add wake: true to its docker")
	}
	return r, p.fill(r, l, a)
}
