package config

import (
	"strconv"
	"time"
)

//go:generate go test -run ^TestSchemaIsCurrent$ -update .

// Config is a whole configuration file, checked, with every default filled in.
type Config struct {
	Section
	Node      string     `yaml:"node" kind:"label" doc:"How this hop names itself in logs, headers and error pages. Default: the host name."`
	Datapath  string     `yaml:"datapath" enum:"auto sockmap userspace" default:"auto" doc:"How the bytes of flows move. auto begins in userspace, and gives flows to sockmap that send small messages back and forth, while few do: that is faster then. sk_msg is for routes only. One that is named and not there keeps the daemon from starting."`
	Listeners []Listener `yaml:"listeners" required:"true" nonempty:"true" noun:"a listener" doc:"Where the daemon accepts connections, and where it sends them."`
	Limits    Limits     `yaml:"limits" noun:"limits" doc:"Bounds on what strangers can make the daemon spend."`
	AccessLog *AccessLog `yaml:"access_log" noun:"access_log" doc:"Where the requests of all http and https listeners are written down that say nothing else. Default: only the daemon's own log has them."`
	Control   Control    `yaml:"control" noun:"control" doc:"How the daemon is observed and commanded."`

	File     string   `yaml:"-"` // the name that Load or Parse was given
	Warnings []*Error `yaml:"-"` // what is allowed but looks like a mistake, in the order of the file
}

// Listener is a set of addresses that share a mode and routes.
type Listener struct {
	Section
	Name         string        `yaml:"name" kind:"label" doc:"The listener's name in logs, metrics and status. Default: the mode and the first port, such as sni-443."`
	Listen       []string      `yaml:"listen" kind:"listen" required:"true" nonempty:"true" doc:"Addresses to accept on: \":443\" (IPv4 and IPv6), \"192.0.2.1:443\", \"[2001:db8::1]:443\", \"0.0.0.0:443\" (IPv4 only), \"[::]:443\" (IPv6 only), \"tailnet:443\" (this node's tailnet addresses only, for those who come by the tailnet, or from this host), \"eth0:443\" (an interface's addresses, followed), \"fly-global-services:443\" (a host's addresses, looked up at start and reload)."`
	Mode         string        `yaml:"mode" enum:"sni tcp http https" required:"true" doc:"sni routes by the TLS server name and never decrypts, tcp looks at nothing, https terminates TLS and routes by host and path, http does the same without TLS."`
	AcceptProxy  *AcceptProxy  `yaml:"accept_proxy" noun:"accept_proxy" doc:"Believe PROXY protocol headers, from these peers only. Without it such bytes are data."`
	Certificates []Certificate `yaml:"certificates" nonempty:"true" noun:"a certificate" doc:"What an https listener shows, chosen by server name. The first one is shown where none fits."`
	Docker       *Docker       `yaml:"docker" noun:"docker" doc:"Routes by the labels of containers on this host."`
	Allow        []string      `yaml:"allow" kind:"peer" nonempty:"true" doc:"Who may use this listener, all others are refused: a CIDR, an IP address, or, of the tailnet, a user's login (with @), a tag (tag:home) or a node's name."`
	Deny         []Deny        `yaml:"deny" short:"from" nonempty:"true" noun:"an item of deny" doc:"Who is refused before a byte is read, and where a PROXY header is believed, by the address in it: a CIDR, an IP address, or { file: FILE } with one of them on each line."`
	AccessLog    *AccessLog    `yaml:"access_log" noun:"access_log" doc:"Where this listener's requests are written down, instead of the configuration's access_log."`
	Routes       []Route       `yaml:"routes" noun:"a route" doc:"Matches and their targets. The most exact name wins: exact, then the longest wildcard, then default."`
	HSTS         *HSTS         `yaml:"hsts" short:"max_age" noun:"hsts" doc:"Tell browsers to come by https only from now on (Strict-Transport-Security), for this long: 1y, 180d or 24h. On https listeners."`
	ServerTiming bool          `yaml:"server_timing" kind:"true" doc:"Show in a Server-Timing header how long each hop of the path took, under its node's name: on this hop, and on those behind it that believe it (accept_proxy)."`
	Default      *Action       `yaml:"default" noun:"default" doc:"Where connections go that no route matched: the next hop."`
	WhileDown    string        `yaml:"while_down" enum:"accept close" doc:"What an sni or tcp listener does while no target of its default can be reached: accept connections and try (the default), or close its sockets, so that who looks whether the port answers (a load balancer, the announcement of an anycast address) sends new connections elsewhere. Connections that there are go on."`
}

// AcceptProxy names the peers whose PROXY headers are believed.
type AcceptProxy struct {
	Section
	// From holds CIDRs (masked), IP addresses, tailnet node names (lower-case), user logins (with an @)
	// and tags (tag:x).
	From []string `yaml:"from" kind:"peer" required:"true" nonempty:"true" doc:"Who is believed: a CIDR, an IP address, a tailnet node name, a user's login (with @), or a tag (tag:edge). A header from anyone else closes the connection. Who is named here speaks for others, and is never a client itself."`
	// Required says that there is a header on each connection, as there must be on tcp listeners.
	Required bool `yaml:"required" kind:"true" doc:"Close connections without a PROXY header, so that what strangers write about themselves through a hop that forgets send_proxy is not believed. Always so on tcp listeners."`
}

// Deny is a part of those who may not connect. Exactly one of its fields is set.
type Deny struct {
	Section
	// From is a masked CIDR or an IP address, in the form that [ParsePrefix] reads.
	From string `yaml:"from" kind:"prefix" doc:"A CIDR or an IP address."`
	File string `yaml:"file" kind:"file" doc:"A file with a CIDR or an IP address on each line; what # or ; begins is a comment. It is read again when it changes: replace it by renaming a new one. A relative path starts at the configuration file's folder."`
}

// Certificate is one source of certificates. Exactly one of its fields is set.
type Certificate struct {
	Section
	Files     *CertFiles `yaml:"files" noun:"files" doc:"A certificate chain and its key in PEM files."`
	ACME      *ACME      `yaml:"acme" noun:"acme" doc:"Certificates that are obtained and renewed by ACME."`
	Tailscale bool       `yaml:"tailscale" kind:"true" doc:"The certificate of this node's *.ts.net name, from the local tailscaled."`
}

// CertFiles names PEM files. Paths are absolute, or relative to the working directory where Parse was given
// a bare file name.
type CertFiles struct {
	Section
	Cert string `yaml:"cert" kind:"file" required:"true" doc:"The certificate followed by its chain, PEM. A relative path starts at the configuration file's folder."`
	Key  string `yaml:"key" kind:"file" required:"true" doc:"The private key, PEM. A relative path starts at the configuration file's folder."`
}

// ACME asks for certificates from an ACME authority. Naming the authority is agreeing to its terms.
type ACME struct {
	Section
	Names      []string  `yaml:"names" kind:"name" nonempty:"true" doc:"The names to get certificates for, one each. *.example.org needs dns."`
	OnDemand   []string  `yaml:"on_demand" kind:"name" nonempty:"true" doc:"Names that get a certificate when a client first asks for them: exact, or *.example.org for one label or more in its place."`
	Email      string    `yaml:"email" kind:"email" doc:"Whom the authority writes to when something is wrong."`
	Directory  string    `yaml:"directory" kind:"url" default:"https://acme-v02.api.letsencrypt.org/directory" doc:"The authority's ACME directory URL."`
	CA         string    `yaml:"ca" kind:"file" doc:"A PEM file with the root certificate that the directory of a private authority is believed by, beside the system's. A relative path starts at the configuration file's folder."`
	EAB        *EAB      `yaml:"eab" noun:"eab" doc:"External account binding: what an authority gives its customers to register with."`
	Fallback   *Fallback `yaml:"fallback" noun:"fallback" doc:"A second authority, asked when the first one fails."`
	Challenges []string  `yaml:"challenges" enum:"http-01 tls-alpn-01 dns-01" nonempty:"true" doc:"How the authority may check the names. Default: dns-01 where dns is set, else http-01 and tls-alpn-01, which need nothing but edges that pass port 80 or 443 on."`
	DNS        *DNSHook  `yaml:"dns" noun:"dns" doc:"The program that sets the TXT records of dns-01."`
	Storage    string    `yaml:"storage" kind:"file" default:"/var/lib/tailsplice/acme" doc:"The folder where accounts, keys and certificates are kept. A relative path starts at the configuration file's folder."`
}

// EAB is an external account binding (RFC 8555 7.3.4).
type EAB struct {
	Section
	KeyID  string `yaml:"key_id" required:"true" doc:"The key's id, from the authority."`
	MACKey string `yaml:"mac_key" kind:"mac" required:"true" doc:"The MAC key, base64url, from the authority."`
}

// Fallback is a second ACME authority.
type Fallback struct {
	Section
	Directory string `yaml:"directory" kind:"url" required:"true" doc:"Its ACME directory URL."`
	CA        string `yaml:"ca" kind:"file" doc:"As beside it, for this authority."`
	EAB       *EAB   `yaml:"eab" noun:"eab" doc:"As beside it, for this authority."`
}

// DNSHook is a program that sets and removes TXT records: it is run as EXEC present FQDN VALUE and EXEC cleanup FQDN VALUE.
type DNSHook struct {
	Section
	Exec    []string      `yaml:"exec" kind:"word" required:"true" nonempty:"true" repeats:"true" doc:"The program and its arguments, to which present or cleanup, the record's name and its value are added. There is no shell. A relative path with a / starts at the configuration file's folder."`
	Timeout time.Duration `yaml:"timeout" default:"2m" min:"1s" max:"1h" doc:"How long one run may take."`
	Wait    time.Duration `yaml:"wait" default:"0s" min:"0s" max:"1h" doc:"How long to wait after present, where records need time to spread and the program doesn't wait itself."`
}

// Route is a match and what happens with what it matches.
type Route struct {
	SNI     []string          `yaml:"sni" kind:"name" nonempty:"true" doc:"Server names on an sni listener: exact, or *.example.org for one label or more in its place."`
	ALPN    []string          `yaml:"alpn" kind:"alpn" nonempty:"true" doc:"Narrows sni: the client offers one of these protocols; acme-tls/1 only if it offers nothing else."`
	Host    []string          `yaml:"host" kind:"name" nonempty:"true" doc:"Host names on an http or https listener: exact, or *.example.org for one label or more in its place."`
	Path    string            `yaml:"path" kind:"path" doc:"Narrows host: /api and /api/ both take /api and everything below /api/, but not /apis. The longest wins. It is compared decoded."`
	Methods []string          `yaml:"methods" kind:"method" nonempty:"true" doc:"Narrows host: the request has one of these methods. GET takes HEAD too."`
	Headers map[string]string `yaml:"headers" kind:"header_value" key:"header" nonempty:"true" doc:"Narrows host: the request has all of these headers with these values; \"*\" is any value."`
	Action  `yaml:",inline"`
}

// Action is what happens with a connection or request: exactly one of Forward, Reject and Redirect.
type Action struct {
	Section
	Forward     []Forward `yaml:"forward" short:"to" nonempty:"true" noun:"a target" doc:"The target: HOST:PORT, tailnet://NODE:PORT, docker://CONTAINER:PORT or unix:///PATH. On http and https also a list of several."`
	SendProxy   string    `yaml:"send_proxy" enum:"v2" doc:"Begin the connection to the target with a PROXY protocol header of this version."`
	Transparent bool      `yaml:"transparent" kind:"true" doc:"Connect to the target from the client's own address, so that a container sees the client on its socket. The target's answers must come by this host: it is for containers and virtual machines here."`
	Reject      bool      `yaml:"reject" kind:"true" doc:"Refuse the connection."`
	Datapath    string    `yaml:"datapath" enum:"auto sockmap sk_msg userspace" doc:"The datapath of these flows. Default: the configuration's datapath. sk_msg is for a target that is a process on this host: its bytes don't pass TCP there (docs/local.md says which processes can't have that)."`
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

// Forward is one of several targets.
type Forward struct {
	Section
	To     Target `yaml:"to" required:"true" doc:"The target: HOST:PORT, tailnet://NODE:PORT, docker://CONTAINER:PORT or unix:///PATH."`
	Weight int    `yaml:"weight" default:"1" min:"0" max:"1000" doc:"Its share of the requests, beside the others' weights. One of weight 0 gets those that all others failed."`
}

// Limits bounds what strangers can make the daemon spend.
type Limits struct {
	Section
	Connections          int           `yaml:"connections" default:"65536" min:"1" max:"16777216" doc:"Connections at a time, all together. Where there is no room for one more, the oldest that waits for its TLS ClientHello goes."`
	ConnectionsPerSource int           `yaml:"connections_per_source" default:"256" min:"1" max:"16777216" doc:"Connections at a time from one IPv4 address or one IPv6 /64. It looks at the PROXY address where that is believed."`
	Requests             int           `yaml:"requests" default:"8192" min:"1" max:"16777216" doc:"HTTP requests under way at a time, all together: upgraded connections and streams count until they end."`
	RequestsPerSource    int           `yaml:"requests_per_source" default:"256" min:"1" max:"16777216" doc:"HTTP requests under way at a time from one IPv4 address or one IPv6 /64. A few more wait for up to 2 seconds. It looks at the client that a trusted hop names, and does not bound the hop itself."`
	HelloTimeout         time.Duration `yaml:"hello_timeout" default:"5s" min:"10ms" max:"10m" doc:"How long a client may take for its TLS ClientHello or its PROXY header."`
	HelloBytes           int           `yaml:"hello_bytes" kind:"size" default:"65536" min:"512" max:"1MiB" doc:"How many bytes of TLS records a ClientHello may take."`
	IdleTimeout          time.Duration `yaml:"idle_timeout" default:"1h" min:"10ms" max:"8760h" doc:"A flow that moves no byte in either direction for this long is closed."`
	FlowBuffer           int64         `yaml:"flow_buffer" kind:"size" default:"2MiB" min:"4KiB" max:"1GiB" doc:"How much memory a flow may hold while its reader is slower than its writer, beside the kernel's socket buffers (net.ipv4.tcp_rmem, tcp_wmem)."`

	// NewConnectionsPerSource is nil where there is no bound.
	NewConnectionsPerSource *Rate `yaml:"new_connections_per_source" short:"rate" noun:"new_connections_per_source" doc:"New connections over time from one IPv4 address or one IPv6 /64, such as 20/s; more are refused before a byte is read. It looks at the PROXY address where that is believed. Default: no bound."`
}

// Rate is how often something may happen.
type Rate struct {
	Section
	Rate  string `yaml:"rate" kind:"rate" required:"true" doc:"How many in a second, a minute or an hour: 20/s, 300/m, 1000/h."`
	Burst int    `yaml:"burst" min:"1" max:"1000000" doc:"How many may come at once after a pause. Default: as many as the rate's number."`
}

// Every is the time that one of them takes.
func (r *Rate) Every() time.Duration {
	n, per := cutRate(r.Rate)
	return per / time.Duration(n)
}

// Control is how the daemon is observed and commanded.
type Control struct {
	Section
	Socket  string `yaml:"socket" kind:"socket" default:"/run/tailsplice/control.sock" doc:"The unix socket that the other commands talk to."`
	Metrics string `yaml:"metrics" kind:"metrics" doc:"IP:PORT where Prometheus metrics are served. Default: nowhere."`
	Health  string `yaml:"health" kind:"health" doc:"Where /healthz and /readyz answer: IP:PORT, or \"tailnet:9465\" for this node's tailnet addresses only. Default: nowhere."`
}

// Pos is a place in the configuration file. Both count from 1; columns count characters. The zero Pos is
// the place of something that did not come from a file.
type Pos struct {
	Line, Col int
}

// IsValid reports whether p came from a file.
func (p Pos) IsValid() bool { return p.Line > 0 }

// String returns LINE:COL.
func (p Pos) String() string {
	return strconv.Itoa(p.Line) + ":" + strconv.Itoa(p.Col)
}

// before reports whether p stands before q in the file.
func (p Pos) before(q Pos) bool {
	return p.Line < q.Line || p.Line == q.Line && p.Col < q.Col
}

// Section is where a part of the configuration stands in its file. A Section that was made in Go is empty,
// and says so with zero positions.
type Section struct {
	Pos    Pos `yaml:"-"` // its first key, or its brace
	places []place
}

// place is where one value stands: that of a key (index -1), or one item of a list of scalars.
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
	if len(index) > 0 {
		if p := s.find(key, index[0]); p != nil {
			return p.pos
		}
	}
	if p := s.find(key, -1); p != nil {
		return p.pos
	}
	return s.Pos
}

func (s *Section) find(key string, index int) *place {
	for i := range s.places {
		if p := &s.places[i]; p.key == key && p.index == index {
			return p
		}
	}
	return nil
}

// has reports whether the file has the key here, understood or not.
func (s *Section) has(key string) bool { return s.find(key, -1) != nil }

// unclear reports whether the file has the key here with a value that was not understood.
func (s *Section) unclear(key string) bool {
	p := s.find(key, -1)
	return p != nil && p.unclear
}

// keyAt returns where the key itself stands, or else the section.
func (s *Section) keyAt(key string) Pos {
	if p := s.find(key, -1); p != nil {
		return p.keyPos
	}
	return s.Pos
}
