package config

import (
	"cmp"
	"slices"
	"strconv"
	"time"
)

//go:generate go test -run IsCurrent$ -update .

// Config is a whole configuration file, checked, with every default filled in.
type Config struct {
	Section
	Node      string      `yaml:"node" kind:"label"`
	Datapath  string      `yaml:"datapath" enum:"auto sockmap userspace" default:"auto"`
	Listeners []*Listener `yaml:"listeners" required:"true" nonempty:"true" noun:"a listener"`
	Limits    Limits      `yaml:"limits" noun:"limits"`
	AccessLog *AccessLog  `yaml:"access_log" noun:"access_log"`
	Control   Control     `yaml:"control" noun:"control"`

	File     string   `yaml:"-"` // the name that Load or Parse was given
	Warnings []*Error `yaml:"-"` // what is allowed but looks like a mistake, in the order of the file
}

// Listener is a set of addresses that share a mode and routes.
type Listener struct {
	Section
	Name         string         `yaml:"name" kind:"label"`
	Listen       []string       `yaml:"listen" kind:"listen" required:"true" nonempty:"true"`
	Mode         string         `yaml:"mode" enum:"sni tcp http https" required:"true"`
	AcceptProxy  *AcceptProxy   `yaml:"accept_proxy" noun:"accept_proxy"`
	Certificates []*Certificate `yaml:"certificates" nonempty:"true" noun:"a certificate"`
	Docker       *Docker        `yaml:"docker" noun:"docker"`
	Allow        []string       `yaml:"allow" kind:"peer" nonempty:"true"`
	Deny         []*Deny        `yaml:"deny" short:"from" nonempty:"true" noun:"an item of deny"`
	AccessLog    *AccessLog     `yaml:"access_log" noun:"access_log"`
	Routes       []*Route       `yaml:"routes" noun:"a route"`
	HSTS         *HSTS          `yaml:"hsts" short:"max_age" noun:"hsts"`
	ServerTiming bool           `yaml:"server_timing" kind:"true"`
	Default      *Action        `yaml:"default" noun:"default"`
	WhileDown    string         `yaml:"while_down" enum:"accept close"`
	Announce     *Announce      `yaml:"announce" noun:"announce"`
}

// Announce says how others learn whether the listener should get connections. It has File, Up or Down.
type Announce struct {
	Section
	File    string        `yaml:"file" kind:"file"`
	Up      []string      `yaml:"up" kind:"word" nonempty:"true" repeats:"true"`
	Down    []string      `yaml:"down" kind:"word" nonempty:"true" repeats:"true"`
	Timeout time.Duration `yaml:"timeout" default:"5s" min:"100ms" max:"5m"`
	Grace   time.Duration `yaml:"grace" default:"5s" min:"0s" max:"10m"`
}

// AcceptProxy names the peers whose PROXY headers are believed.
type AcceptProxy struct {
	Section
	// From holds CIDRs (masked), IP addresses, tailnet node names (lower-case), user logins (with an @)
	// and tags (tag:x).
	From []string `yaml:"from" kind:"peer" required:"true" nonempty:"true"`
	// Required says that there is a header on each connection, as there must be on tcp listeners.
	Required bool `yaml:"required" kind:"true"`
}

// Deny is a part of those who may not connect. Exactly one of its fields is set.
type Deny struct {
	Section
	// From is a masked CIDR or an IP address, in the form that [ParsePrefix] reads.
	From string `yaml:"from" kind:"prefix"`
	File string `yaml:"file" kind:"file"`
}

// Certificate is one source of certificates. Exactly one of its fields is set.
type Certificate struct {
	Section
	Files     *CertFiles `yaml:"files" noun:"files"`
	ACME      *ACME      `yaml:"acme" noun:"acme"`
	Tailscale bool       `yaml:"tailscale" kind:"true"`
}

// CertFiles names PEM files. Paths are absolute, or relative to the working directory where Parse was given
// a bare file name.
type CertFiles struct {
	Section
	Cert string `yaml:"cert" kind:"file" required:"true"`
	Key  string `yaml:"key" kind:"file" required:"true"`
}

// ACME asks for certificates from an ACME authority. Naming the authority is agreeing to its terms.
type ACME struct {
	Section
	Names      []string  `yaml:"names" kind:"name" nonempty:"true"`
	OnDemand   []string  `yaml:"on_demand" kind:"name" nonempty:"true"`
	Email      string    `yaml:"email" kind:"email"`
	Directory  string    `yaml:"directory" kind:"url" default:"https://acme-v02.api.letsencrypt.org/directory"`
	CA         string    `yaml:"ca" kind:"file"`
	EAB        *EAB      `yaml:"eab" noun:"eab"`
	Fallback   *Fallback `yaml:"fallback" noun:"fallback"`
	Challenges []string  `yaml:"challenges" enum:"http-01 tls-alpn-01 dns-01" nonempty:"true"`
	DNS        *DNSHook  `yaml:"dns" noun:"dns"`
	Storage    string    `yaml:"storage" kind:"file" default:"/var/lib/tailsplice/acme"`
}

// EAB is an external account binding (RFC 8555 7.3.4).
type EAB struct {
	Section
	KeyID  string `yaml:"key_id" required:"true"`
	MACKey string `yaml:"mac_key" kind:"mac" required:"true"`
}

// Fallback is a second ACME authority.
type Fallback struct {
	Section
	Directory string `yaml:"directory" kind:"url" required:"true"`
	CA        string `yaml:"ca" kind:"file"`
	EAB       *EAB   `yaml:"eab" noun:"eab"`
}

// DNSHook is a program that sets and removes TXT records: it is run as EXEC present FQDN VALUE and EXEC
// cleanup FQDN VALUE.
type DNSHook struct {
	Section
	Exec    []string      `yaml:"exec" kind:"word" required:"true" nonempty:"true" repeats:"true"`
	Timeout time.Duration `yaml:"timeout" default:"2m" min:"1s" max:"1h"`
	Wait    time.Duration `yaml:"wait" default:"0s" min:"0s" max:"1h"`
}

// Route is a match and what happens with what it matches.
type Route struct {
	SNI     []string          `yaml:"sni" kind:"name" nonempty:"true"`
	ALPN    []string          `yaml:"alpn" kind:"alpn" nonempty:"true"`
	Host    []string          `yaml:"host" kind:"name" nonempty:"true"`
	Path    string            `yaml:"path" kind:"path"`
	Methods []string          `yaml:"methods" kind:"method" nonempty:"true"`
	Headers map[string]string `yaml:"headers" kind:"header_value" key:"header" nonempty:"true"`
	Action  `yaml:",inline"`
}

// Action is what happens with a connection or request: exactly one of Forward, Reject and Redirect.
type Action struct {
	Section
	Forward     []*Forward `yaml:"forward" short:"to" nonempty:"true" noun:"a target"`
	SendProxy   string     `yaml:"send_proxy" enum:"v2"`
	Transparent bool       `yaml:"transparent" kind:"true"`
	Reject      bool       `yaml:"reject" kind:"true"`
	Datapath    string     `yaml:"datapath" enum:"auto sockmap sk_msg userspace"`
	Balancing   `yaml:",inline"`
	HTTP        `yaml:",inline"`
	Access      `yaml:",inline"`
}

// Target is the first target, or none.
func (a *Action) Target() Target {
	if len(a.Forward) == 0 {
		return Target{}
	}
	return a.Forward[0].To
}

// Forward is one of several targets. It is a spare with Weight 0 or Backup.
type Forward struct {
	Section
	To     Target `yaml:"to" required:"true"`
	Weight int    `yaml:"weight" default:"1" min:"0" max:"1000"`
	Backup bool   `yaml:"backup" kind:"true"`
}

// Limits bounds what strangers can make the daemon spend.
type Limits struct {
	Section
	Connections          int           `yaml:"connections" default:"65536" min:"1" max:"16777216"`
	ConnectionsPerSource int           `yaml:"connections_per_source" default:"256" min:"1" max:"16777216"`
	Requests             int           `yaml:"requests" default:"8192" min:"1" max:"16777216"`
	RequestsPerSource    int           `yaml:"requests_per_source" default:"256" min:"1" max:"16777216"`
	HelloTimeout         time.Duration `yaml:"hello_timeout" default:"5s" min:"10ms" max:"10m"`
	HelloBytes           int           `yaml:"hello_bytes" kind:"size" default:"65536" min:"512" max:"1MiB"`
	IdleTimeout          time.Duration `yaml:"idle_timeout" default:"1h" min:"10ms" max:"8760h"`
	Memory               int64         `yaml:"memory" kind:"size" min:"16MiB" max:"16384GiB"`
	FlowBuffer           int64         `yaml:"flow_buffer" kind:"size" default:"2MiB" min:"4KiB" max:"1GiB"`

	// NewConnectionsPerSource is nil where there is no bound.
	NewConnectionsPerSource *Rate `yaml:"new_connections_per_source" short:"rate" noun:"new_connections_per_source"`
}

// Rate is how often something may happen.
type Rate struct {
	Section
	Rate  string `yaml:"rate" kind:"rate" required:"true"`
	Burst int    `yaml:"burst" min:"1" max:"1000000"`
}

// Every is the time that one of them takes.
func (r *Rate) Every() time.Duration {
	n, per := cutRate(r.Rate)
	return per / time.Duration(n)
}

// Control is how the daemon is observed and commanded.
type Control struct {
	Section
	Socket  string `yaml:"socket" kind:"socket" default:"/run/tailsplice/control.sock"`
	Metrics string `yaml:"metrics" kind:"metrics"`
	Health  string `yaml:"health" kind:"health"`
}

// Pos is a place in the configuration file. Both count from 1; columns count characters. The zero Pos is
// the place of something that did not come from a file.
type Pos struct {
	Line, Col int
}

// IsValid reports whether p came from a file.
func (p Pos) IsValid() bool { return p.Line > 0 }

// String returns LINE:COL.
func (p Pos) String() string { return strconv.Itoa(p.Line) + ":" + strconv.Itoa(p.Col) }

// compare is negative where p stands before q in the file.
func (p Pos) compare(q Pos) int {
	return cmp.Or(cmp.Compare(p.Line, q.Line), cmp.Compare(p.Col, q.Col))
}

// Section is where a part of the configuration stands in its file. A Section that was made in Go has zero
// positions.
type Section struct {
	Pos    Pos `yaml:"-"` // its first key, or its brace
	places []place
}

// place is where one value stands: the value of a key (index -1), or one item of a list of scalars.
type place struct {
	key     string
	index   int
	pos     Pos
	keyPos  Pos
	unclear bool // present, but not understood: an error was already reported
}

// At returns where the value of a key of this section stands, such as At("forward"), or one item of a
// list of scalars, such as At("listen", 0), so that later errors can point there. For a key that the file
// does not have (a default) it is the section's own position.
func (s *Section) At(key string, index ...int) Pos {
	for _, i := range append(index, -1) {
		if p := s.find(key, i); p != nil {
			return p.pos
		}
	}
	return s.Pos
}

func (s *Section) find(key string, index int) *place {
	i := slices.IndexFunc(s.places, func(p place) bool { return p.key == key && p.index == index })
	if i < 0 {
		return nil
	}
	return &s.places[i]
}

// has reports whether the file has the key here, understood or not.
func (s *Section) has(key string) bool { return s.find(key, -1) != nil }

// unclear reports whether the file has the key here with a value that was not understood.
func (s *Section) unclear(key string) bool {
	p := s.find(key, -1)
	return p != nil && p.unclear
}

// sets reports whether the file has the key here with a value that was understood.
func (s *Section) sets(key string) bool {
	p := s.find(key, -1)
	return p != nil && !p.unclear
}

// among returns those of some keys that the file has here.
func (s *Section) among(keys ...string) []string {
	return slices.DeleteFunc(keys, func(key string) bool { return !s.has(key) })
}

// keyAt returns where the key itself stands, or else the section.
func (s *Section) keyAt(key string) Pos {
	if p := s.find(key, -1); p != nil {
		return p.keyPos
	}
	return s.Pos
}
