package container

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"

	"github.com/tailsplice/tailsplice/userspace/spelling"
)

// Labels that Compose puts on what it starts.
// Source: https://github.com/compose-spec/compose-spec, github.com/docker/compose/v2/pkg/api/labels.go.
const (
	labelProject = "com.docker.compose.project"
	labelService = "com.docker.compose.service"
	labelOneOff  = "com.docker.compose.oneoff" // "True" for `docker compose run`
)

// idPrefix is the least part of an id that names a container, as `docker ps` shows: less may hit by chance.
const idPrefix = 12

// table is one list of all containers, immutable.
type table struct {
	asked    time.Time
	all      []*one // by name
	byName   map[string]*one
	services map[string]map[string][]*one // service, project
	labelled []Labelled                   // by name
}

// one container.
type one struct {
	id      string
	name    string
	project string // Compose's, or ""
	service string
	state   container.ContainerState
	health  string // "starting", "unhealthy", or "": it is healthy, or nobody checks
	mode    string // network mode: "host", "none", "container:ID", "default", a network's name
	addrs   []netip.Addr
}

func newTable(list []container.Summary, asked time.Time) *table {
	t := &table{asked: asked, byName: map[string]*one{}, services: map[string]map[string][]*one{}}
	for _, s := range list {
		o := &one{id: s.ID, name: s.ID, state: s.State, health: health(&s), mode: s.HostConfig.NetworkMode, addrs: addresses(s.NetworkSettings)}
		for _, n := range s.Names {
			// Legacy links give it names like "/other/alias": not its own.
			if n = strings.TrimPrefix(n, "/"); !strings.Contains(n, "/") {
				o.name = n
			}
		}
		if s.Labels[labelOneOff] != "True" {
			o.project, o.service = s.Labels[labelProject], s.Labels[labelService]
		}
		t.all = append(t.all, o)
		t.byName[o.name] = o
	}
	slices.SortFunc(t.all, func(a, b *one) int { return strings.Compare(a.name, b.name) })
	for _, o := range t.all {
		if o.service == "" {
			continue
		}
		if t.services[o.service] == nil {
			t.services[o.service] = map[string][]*one{}
		}
		t.services[o.service][o.project] = append(t.services[o.service][o.project], o)
	}
	return t
}

// health is what the container's health check says, if it is anything but good. Before version 1.52 of the
// API only the status told it: "Up 3 minutes (unhealthy)", "Up 2 seconds (health: starting)".
func health(s *container.Summary) string {
	var says string
	if s.Health != nil {
		says = string(s.Health.Status)
	} else if _, status, ok := strings.Cut(strings.TrimSuffix(s.Status, ")"), "("); ok {
		says = strings.TrimPrefix(status, "health: ")
	}
	switch container.HealthStatus(says) {
	case container.Starting, container.Unhealthy:
		return says
	}
	return ""
}

// addresses of all networks, in the order of their names, IPv4 first in each.
func addresses(s *container.NetworkSettingsSummary) []netip.Addr {
	if s == nil {
		return nil
	}
	var out []netip.Addr
	for _, name := range slices.Sorted(maps.Keys(s.Networks)) {
		n := s.Networks[name]
		if n == nil {
			continue
		}
		for _, a := range []netip.Addr{n.IPAddress, n.GlobalIPv6Address} {
			if a.IsValid() && !a.IsUnspecified() {
				out = append(out, a.Unmap())
			}
		}
	}
	return out
}

// resolve returns the addresses of what runs under name. turn rotates replicas.
func (t *table) resolve(name string, turn int) ([]netip.Addr, error) {
	found, err := t.lookup(name)
	if err != nil {
		return nil, err
	}
	return t.addressesOf(name, found, turn)
}

// addressesOf returns the addresses of what runs of found: starting or unhealthy ones if there is no other.
func (t *table) addressesOf(name string, found []*one, turn int) ([]netip.Addr, error) {
	var running, ailing []*one
	for _, o := range found {
		switch {
		case o.state != container.StateRunning:
		case o.health != "":
			ailing = append(ailing, o)
		default:
			running = append(running, o)
		}
	}
	if len(running) == 0 {
		running = ailing
	}
	if len(running) == 0 {
		return nil, &Error{Kind: KindStopped, Name: name, stopped: found[0], msg: fmt.Sprintf("container %q is %s", found[0].name, found[0].state)}
	}
	var addrs []netip.Addr
	for i := range running {
		a, err := t.reach(running[(i+turn)%len(running)])
		if err != nil && len(running) == 1 {
			return nil, err
		}
		addrs = append(addrs, a...)
	}
	if len(addrs) == 0 {
		return nil, noAddress(running[0])
	}
	return addrs, nil
}

// networkOf returns whose network o uses: its own, or another container's.
func (t *table) networkOf(o *one) (*one, error) {
	for range 8 { // container:ID may point at another container:ID; Docker forbids loops
		other, joined := strings.CutPrefix(o.mode, "container:")
		if !joined {
			break
		}
		next, err := t.lookup(other)
		if err != nil {
			return nil, &Error{Kind: KindUnreachable, Name: o.name, Err: err,
				msg: fmt.Sprintf("container %q uses the network of container %s, which is gone", o.name, other)}
		}
		o = next[0]
	}
	return o, nil
}

// reach returns the addresses at which o's ports are.
func (t *table) reach(o *one) ([]netip.Addr, error) {
	o, err := t.networkOf(o)
	if err != nil {
		return nil, err
	}
	if o.mode == "host" {
		return []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}, nil
	}
	if len(o.addrs) == 0 {
		return nil, noAddress(o)
	}
	return o.addrs, nil
}

func noAddress(o *one) error {
	e := &Error{Kind: KindUnreachable, Name: o.name}
	if o.mode == "none" {
		e.msg = fmt.Sprintf("container %q has no network (--network none)", o.name)
	} else {
		e.msg = fmt.Sprintf("container %q has no address: connect it to a network (docker network connect NETWORK %s)", o.name, o.name)
	}
	return e
}

// lookup finds a container, or a service's replicas. As in Docker, a container's own name goes first.
func (t *table) lookup(name string) ([]*one, error) {
	name = strings.TrimPrefix(name, "/")
	if o := t.byName[name]; o != nil {
		return []*one{o}, nil
	}
	if found := t.byID(name); found != nil {
		return []*one{found}, nil
	}
	if project, service, ok := strings.Cut(name, "/"); ok {
		if found := t.services[service][project]; found != nil {
			return found, nil
		}
		return nil, t.unknown(name)
	}
	if projects := t.services[name]; len(projects) == 1 {
		for _, found := range projects {
			return found, nil
		}
	} else if len(projects) > 1 {
		var candidates []string
		for _, project := range slices.Sorted(maps.Keys(projects)) {
			candidates = append(candidates, project+"/"+name)
		}
		return nil, &Error{Kind: KindAmbiguous, Name: name,
			msg: fmt.Sprintf("service %q is in %d Compose projects: say %s", name, len(projects), either(candidates))}
	}
	// PROJECT_SERVICE and PROJECT-SERVICE, as in the names that Compose makes.
	var found []*one
	var candidates []string
	for service, projects := range t.services {
		for project, ones := range projects {
			if name == project+"_"+service || name == project+"-"+service {
				found = ones
				candidates = append(candidates, project+"/"+service)
			}
		}
	}
	switch len(candidates) {
	case 0:
		return nil, t.unknown(name)
	case 1:
		return found, nil
	}
	slices.Sort(candidates)
	return nil, &Error{Kind: KindAmbiguous, Name: name, msg: fmt.Sprintf("%q may be %s: name one of them", name, either(candidates))}
}

// resolveIDs returns the addresses of what runs of the containers with these whole ids, and no names.
func (t *table) resolveIDs(ids string, turn int) ([]netip.Addr, error) {
	found := t.lookupIDs(ids)
	if len(found) == 0 {
		return nil, &Error{Kind: KindUnknown, Name: ids, msg: "the container was removed"}
	}
	return t.addressesOf(ids, found, turn)
}

func (t *table) lookupIDs(ids string) (found []*one) {
	for id := range strings.SplitSeq(ids, ",") {
		if o := t.byID(id); o != nil {
			found = append(found, o)
		}
	}
	return found
}

// either joins to "a or b", "a, b or c".
func either(s []string) string {
	if len(s) == 1 {
		return s[0]
	}
	return strings.Join(s[:len(s)-1], ", ") + " or " + s[len(s)-1]
}

// byID finds a container by at least 12 hex digits of its id.
func (t *table) byID(id string) *one {
	if len(id) < idPrefix || strings.Trim(id, "0123456789abcdef") != "" {
		return nil
	}
	var found *one
	for _, o := range t.all {
		if strings.HasPrefix(o.id, id) {
			if found != nil {
				return nil
			}
			found = o
		}
	}
	return found
}

func (t *table) unknown(name string) error {
	var names []string
	for _, o := range t.all {
		names = append(names, o.name)
	}
	few := strings.Join(names, ", ")
	const most = 8 // more than fit in a line help nobody
	if len(names) > most {
		few = ""
	}
	for service, projects := range t.services {
		if _, taken := t.byName[service]; !taken {
			names = append(names, service)
		}
		for project := range projects {
			names = append(names, project+"/"+service)
		}
	}
	slices.Sort(names)
	msg := fmt.Sprintf("no container or Compose service %q", name)
	switch near := spelling.Nearest(name, names); {
	case near != "":
		msg += fmt.Sprintf("; did you mean %q?", near)
	case len(names) == 0:
		msg += "; there is no container at all"
	case few != "":
		msg += "; there are " + few
	}
	return &Error{Kind: KindUnknown, Name: name, msg: msg}
}

// asStopped returns err as the error about a stopped container.
func asStopped(err error) (*Error, bool) {
	e, ok := errors.AsType[*Error](err)
	return e, ok && e.stopped != nil
}
