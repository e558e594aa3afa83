package front

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/container"
	"github.com/tailsplice/tailsplice/userspace/dial"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

// goneFor is how long a container that was removed still answers 503 for its
// names: `docker compose up` removes one before it makes the next, and until
// then the name must not lead elsewhere.
const goneFor = time.Minute

// LabelProblem is what keeps a container's labels, or a part of them, from
// making a route.
type LabelProblem struct {
	Container string `json:"container"`
	Label     string `json:"label"`
	Listener  string `json:"listener,omitempty"` // "": on all
	Problem   string `json:"problem"`
}

// labelRoutes is what the labels of containers make of the listeners. It is
// immutable, as are the services with its rules.
type labelRoutes struct {
	services map[string]*service // by listener, those with docker enabled
	problems []LabelProblem
	holders  map[claim]string // key of the candidate that has it
	seen     []container.Labelled
	gone     map[string]goneContainer // by id
	current  context.Context          // ends when others take its place
	end      context.CancelFunc
}

func newLabelRoutes(seen []container.Labelled) *labelRoutes {
	n := &labelRoutes{services: map[string]*service{}, holders: map[claim]string{}, gone: map[string]goneContainer{}, seen: seen}
	n.current, n.end = context.WithCancel(context.Background())
	return n
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

// lookAtLabels makes followLabels look again, soon.
func (f *Front) lookAtLabels() {
	select {
	case f.labelsMoved <- struct{}{}:
	default:
	}
}

// followLabels keeps the routes as the labels are until ctx ends. No flow is
// touched: each has the service that it began with.
func (f *Front) followLabels(ctx context.Context) {
	expire := time.NewTimer(0)
	defer expire.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.labelsMoved:
		case <-expire.C:
		}
		if again := f.applyLabels(); again > 0 {
			expire.Reset(again)
		}
	}
}

// applyLabels brings the routes in line with the labels once. again is when the
// next removed container is forgotten, 0 if there is none.
func (f *Front) applyLabels() (again time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return 0
	}
	bases := map[string]*service{}
	for name, l := range f.listeners {
		if s := l.service.Load(); s.base != nil {
			bases[name] = s.base
		}
	}
	next := f.mergeLabels(f.cfg, bases, f.containers.Labelled())
	for name, s := range next.services {
		f.listeners[name].service.Store(s)
	}
	f.commitLabels(next)
	f.countRoutes()
	for _, g := range next.gone {
		if left := max(time.Until(g.at.Add(goneFor)), time.Millisecond); again == 0 || left < again {
			again = left
		}
	}
	return again
}

// prepareLabels puts the labels' routes into the services that cfg was compiled
// to. commitLabels must follow once they are in force.
//
// f.mu is held.
func (f *Front) prepareLabels(cfg *config.Config, services map[string]*service) *labelRoutes {
	bases := map[string]*service{}
	for i := range cfg.Listeners {
		if l := &cfg.Listeners[i]; l.Docker != nil && l.Docker.Enabled {
			bases[l.Name] = services[l.Name]
		}
	}
	if len(bases) > 0 {
		// So that the first request finds its route. Without an answer they come
		// later; containers.Run says why.
		ctx, cancel := context.WithTimeout(f.ctx, 2*time.Second)
		defer cancel()
		f.containers.List(ctx)
	}
	next := f.mergeLabels(cfg, bases, f.containers.Labelled())
	maps.Copy(services, next.services)
	return next
}

// mergeLabels adds the labels' routes to the listeners with docker enabled,
// whose services without them are bases. It changes nothing.
//
// f.mu is held.
func (f *Front) mergeLabels(cfg *config.Config, bases map[string]*service, seen []container.Labelled) *labelRoutes {
	next := newLabelRoutes(seen)
	if len(bases) == 0 {
		return next
	}
	there := map[string]bool{}
	for _, c := range next.seen {
		there[c.ID] = true
	}
	for _, c := range f.labels.seen {
		next.gone[c.ID] = goneContainer{c, time.Now()}
	}
	maps.Copy(next.gone, f.labels.gone)
	maps.DeleteFunc(next.gone, func(id string, g goneContainer) bool { return there[id] || time.Since(g.at) >= goneFor })

	all := next.candidates()
	fits := map[string]bool{}
	for i := range cfg.Listeners {
		l := &cfg.Listeners[i]
		base := bases[l.Name]
		if base == nil {
			continue
		}
		taken := map[claim]string{} // by whom
		for _, r := range base.rules {
			for _, p := range r.patterns {
				taken[claim{l.Name, p, strings.TrimSuffix(r.match.Path, "/")}] = "a configured route"
			}
		}
		var mine []candidate
		for _, c := range all {
			if c.labels.Fits(l.Mode) {
				mine, fits[c.key] = append(mine, c), true
			}
		}
		next.services[l.Name] = base.withRules(f.labelRules(cfg, l, mine, taken, next))
	}
	for _, c := range all {
		if !fits[c.key] {
			next.problem(c.name, "tls", "", "no listener for it has docker enabled: without this label http and https listeners take it, with true only https, with false only http, with passthrough only sni")
		}
	}
	return next
}

func (n *labelRoutes) problem(container, key, listener, format string, args ...any) {
	n.add(LabelProblem{Container: container, Label: config.LabelPrefix + key, Listener: listener, Problem: fmt.Sprintf(format, args...)})
}

func (n *labelRoutes) add(p LabelProblem) {
	if !slices.Contains(n.problems, p) {
		n.problems = append(n.problems, p)
	}
}

// candidates reads the labels of all containers, and joins replicas.
func (n *labelRoutes) candidates() []candidate {
	var all []candidate
	add := func(c container.Labelled, state string) {
		if state == "removed" && slices.ContainsFunc(all, func(o candidate) bool { return o.key == candidateKey(c) }) {
			return // it was replaced
		}
		labels, errs := config.ParseLabels(c.Labels)
		if state != "removed" { // said already
			for _, e := range errs {
				n.add(LabelProblem{Container: c.Name, Label: e.Label, Problem: e.Err.Error()})
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

// labelRules makes the rules of one listener: of those that want the same name
// and path one that runs goes before one that does not, then whoever has it
// already, then the older one.
func (f *Front) labelRules(cfg *config.Config, l *config.Listener, all []candidate, taken map[claim]string, next *labelRoutes) []*rule {
	order := map[string]int{"running": 0, "stopped": 1, "removed": 2}
	slices.SortStableFunc(all, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(order[a.state], order[b.state]), a.created.Compare(b.created), strings.Compare(a.name, b.name))
	})
	// Whoever has a claim and still runs keeps it.
	kept := map[claim]string{}
	for _, c := range all {
		for _, host := range c.labels.Host {
			if k := (claim{l.Name, host, strings.TrimSuffix(c.labels.Path, "/")}); f.labels.holders[k] == c.key && c.state == "running" {
				kept[k] = c.key
			}
		}
	}
	var rules []*rule
	for _, c := range all {
		var hosts []string
		for _, host := range c.labels.Host {
			k := claim{l.Name, host, strings.TrimSuffix(c.labels.Path, "/")}
			by, dup := taken[k]
			if holder := kept[k]; !dup && holder != "" && holder != c.key {
				i := slices.IndexFunc(all, func(o candidate) bool { return o.key == holder })
				by, dup = "container "+all[i].name, true
			}
			guard := guarded(cfg, l, host, c.labels.Path)
			switch {
			case !l.Docker.Allows(host):
				next.problem(c.name, "host", l.Name, "%q is not among docker.hosts of the listener", host)
			case dup && (c.state == "running" || by == "a configured route"):
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
		r, err := f.labelRule(cfg, l, hosts, &c)
		if err != nil {
			next.problem(c.name, "host", l.Name, "%v", err)
			continue
		}
		r.current = next.current
		rules = append(rules, r)
	}
	return rules
}

// labelRule leads to the candidate's own containers, by their ids: whatever
// they are called, and whatever their labels say.
func (f *Front) labelRule(cfg *config.Config, l *config.Listener, hosts []string, c *candidate) (*rule, error) {
	target := config.Target{Scheme: dial.Docker, Host: strings.Join(c.ids, ","), Port: c.labels.Port}
	action := &config.Action{Forward: []config.Forward{{To: target, Weight: 1}}}
	r, err := f.compileRule(cfg, l, strings.Join(hosts, ",")+c.labels.Path, vhost.Match{Path: c.labels.Path}, action)
	if err != nil {
		return nil, err
	}
	r.patterns = hosts
	r.container, r.state, r.dialer = c.name, c.state, f.labelDialer
	r.written = config.Target{Scheme: dial.Docker, Host: c.name, Port: c.labels.Port}.String()
	if r.http != nil { // under its readable name
		up, err := f.newUpstream(cfg, l, r, action)
		if err != nil {
			return nil, err
		}
		r.http.Upstreams = []vhost.Choice{{Upstream: up, Weight: 1}}
	}
	return r, nil
}

// commitLabels makes next what is in force, and logs what is new about it.
//
// f.mu is held.
func (f *Front) commitLabels(next *labelRoutes) {
	type line struct{ listener, route, container, target string }
	lines := func(l *labelRoutes) map[line]bool {
		out := map[line]bool{}
		for name, s := range l.services {
			for _, r := range s.rules {
				if r.container != "" {
					out[line{name, r.name, r.container, r.written}] = true
				}
			}
		}
		return out
	}
	log := func(msg string, in, notIn map[line]bool) {
		for l := range in {
			if !notIn[l] {
				f.log.Info(msg, "listener", l.listener, "route", l.route, "container", l.container, "target", l.target)
			}
		}
	}
	before, after := lines(f.labels), lines(next)
	log("a route from a container's labels was removed", before, after)
	log("a route from a container's labels was added", after, before)
	for _, p := range next.problems {
		if !slices.Contains(f.labels.problems, p) {
			f.log.Warn("a container's label is ignored", "container", p.Container, "label", p.Label, "listener", p.Listener, "problem", p.Problem)
		}
	}
	f.labels.end()
	f.labels = next
}

// dialLabelled connects to the container of a rule by labels. A container that
// was killed a moment ago may leave a dial to it without any answer: once the
// containers have changed, it begins anew, and learns that.
func (r *rule) dialLabelled(ctx context.Context, client netip.Addr) (net.Conn, error) {
	attempt, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(r.current, cancel)()
	up, err := r.dialer.Dial(attempt, r.target, client)
	if err != nil && attempt.Err() != nil && ctx.Err() == nil {
		return r.dialer.Dial(ctx, r.target, client)
	}
	return up, err
}
