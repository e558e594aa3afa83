package main

import (
	"bufio"
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/tailsplice/tailsplice/loader"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/flow"
	"github.com/tailsplice/tailsplice/userspace/tailnet"
)

// installed is the configuration that the packages install. As long as nobody has changed it, init replaces
// it.
//
//go:embed installed.yaml
var installed string

// answers are what init needs to know.
type answers struct {
	Names   []string // that browsers ask for
	Forward string   // the target
	Email   string   // for the certificate authority; home only
}

// role is a hop of the usual path, and what its configuration looks like.
type role struct {
	name, short string
	forward     string // the default target
	email       bool   // is asked for
	config      func(a answers) string
	ports       []uint16 // of the host, which must be free
	before      string   // the tag of the hop before, which is let in
	serves      string   // the ports that it is let in to
}

var roles = []role{
	{name: "edge", short: "an edge, a server with a public address that decrypts nothing",
		forward: "tailnet://home:443", ports: []uint16{443, 80}, before: "tag:edge", serves: "tag:home:443,80",
		config: func(a answers) string {
			return fmt.Sprintf(`# An edge of %s: it passes TLS on by its server name, and has no key.
listeners:
  - listen: [":443"]
    mode: sni
    routes:
      - { sni: %s, forward: %q, send_proxy: v2 }
    default: { reject: true } # names that are not yours
  - listen: [":80"] # for certificates, and for browsers that begin without TLS
    mode: tcp
    default: { forward: %q, send_proxy: v2 }
limits: { new_connections_per_source: 50/s }
`, strings.Join(a.Names, ", "), list(a.Names), a.Forward, onPort80(a.Forward))
		}},
	{name: "home", short: "the server that has the certificates and routes by host",
		forward: "127.0.0.1:8080", email: true, before: "tag:edge", serves: "tag:home:443,80",
		config: func(a answers) string {
			return fmt.Sprintf(`# Home of %s: it ends TLS for what edges pass on, and routes requests.
listeners:
  - listen: ["tailnet:443"]
    mode: https
    accept_proxy: { from: ["tag:edge"], required: true } # who may say where a client comes from
    certificates:
      - { acme: { names: %s%s } }
    routes:
      - { host: %[2]s, forward: %[4]q }
  - listen: ["tailnet:80"]
    mode: http
    accept_proxy: { from: ["tag:edge"], required: true }
    default: { redirect: https }
`, strings.Join(a.Names, ", "), list(a.Names), email(a.Email), a.Forward)
		}},
	{name: "laptop", short: "a machine that roams and answers the requests", forward: "127.0.0.1:8080",
		before: "tag:home", serves: "tag:laptop:8080", config: func(a answers) string {
			return fmt.Sprintf(`# A laptop that serves %s to home. There: forward: tailnet://THIS-NODE:8080
listeners:
  - listen: ["tailnet:8080"]
    mode: http
    accept_proxy: { from: ["tag:home"], required: true } # who may say where a client comes from
    routes:
      - { host: %s, forward: %q } # or "docker://CONTAINER:PORT"
`, strings.Join(a.Names, ", "), list(a.Names), a.Forward)
		}},
}

// list writes names as YAML does.
func list(names []string) string {
	var quoted []string
	for _, n := range names {
		quoted = append(quoted, strconv.Quote(n))
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}

func email(address string) string {
	if address == "" {
		return ""
	}
	return ", email: " + strconv.Quote(address)
}

// onPort80 is the same target for plain HTTP.
func onPort80(target string) string {
	if i := strings.LastIndex(target, ":"); strings.HasSuffix(target, ":443") || strings.HasPrefix(target, "tailnet://") && i > 0 {
		return target[:i] + ":80"
	}
	return target
}

// started is what init has made and found.
type started struct {
	Format  int              `json:"format_version"` // flow.FormatVersion
	Role    string           `json:"role"`
	File    string           `json:"file"`
	Config  string           `json:"config"`
	Machine []loader.Finding `json:"machine"`
	Policy  string           `json:"policy"` // of the tailnet
	DNS     []string         `json:"dns"`    // records, in the form of a zone file; edges only
	Next    string           `json:"next"`   // the command
}

type initOptions struct {
	answers
	file          string
	force, asJSON bool
}

func newInit() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Write a first configuration for an edge, a home server or a laptop",
		Long: `Write a first configuration, and print what else has to be done: the rules that
the tailnet's policy needs, the DNS records to create, and the next command. On
a terminal it asks for everything that no option gives. The file is all that it
changes on this machine.`,
		Example: `  sudo tailsplice init edge --names example.org,www.example.org
  sudo tailsplice init home --names example.org --email me@example.org --forward 127.0.0.1:3000`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	for i := range roles {
		r, o := &roles[i], initOptions{}
		sub := &cobra.Command{
			Use:   r.name,
			Short: "Write a first configuration for " + r.short,
			Long: "Write a first configuration for " + r.short + ",\nand print what else has to be done. " +
				"See tailsplice init --help.",
			Example: "  sudo tailsplice init " + r.name + " --names example.org --forward " + r.forward,
			Args:    noArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				return initRole(cmd, r, o)
			},
		}
		sub.Flags().StringSliceVar(&o.Names, "names", nil, "the host `names` that browsers ask for, separated by commas")
		sub.Flags().StringVar(&o.Forward, "forward", "", "the `target` that connections for them go to (default "+r.forward+")")
		if r.email {
			sub.Flags().StringVar(&o.Email, "email", "", "the `address` that the certificate authority writes to")
		}
		configFlag(sub, &o.file)
		sub.Flags().BoolVar(&o.force, "force", false, "overwrite an existing file")
		jsonFlag(sub, &o.asJSON)
		cmd.AddCommand(sub)
	}
	return cmd
}

func initRole(cmd *cobra.Command, r *role, o initOptions) error {
	old, err := os.ReadFile(o.file)
	if _, statErr := os.Lstat(o.file); statErr == nil && !o.force && (err != nil || string(old) != installed) {
		return fmt.Errorf("%s is there already: --force overwrites it, --config names another file", o.file)
	}
	if term.IsTerminal(int(os.Stdin.Fd())) && !o.asJSON {
		askPerson(cmd.ErrOrStderr(), os.Stdin, r, &o.answers)
	}
	o.Forward = cmp.Or(o.Forward, r.forward)
	if len(o.Names) == 0 {
		return &usageError{errors.New("--names is missing: the host names that browsers ask for, such as " +
			"--names example.org")}
	}
	s := started{Format: flow.FormatVersion, Role: r.name, File: o.file, Config: r.config(o.answers), DNS: []string{},
		Machine: lookAround(cmd.Context(), r, o.Names)}
	if _, err := config.Parse(o.file, []byte(s.Config)); err != nil {
		return fmt.Errorf("no configuration comes of these answers:\n%w", err)
	}
	serves := r.serves
	if _, port, err := net.SplitHostPort(strings.TrimPrefix(o.Forward, "tailnet://")); err == nil && r.name == "edge" {
		serves = strings.Replace(serves, "443", port, 1)
	}
	// Without owners a tag is the admins' at Tailscale. Headscale has neither autogroup:admin nor grants.
	s.Policy = fmt.Sprintf(`{"tagOwners": {%q: [], %q: []},
   "acls": [{"action": "accept", "src": [%q], "dst": [%q]}]}`,
		r.before, serves[:strings.LastIndex(serves, ":")], r.before, serves)
	if r.name == "edge" {
		s.DNS = records(o.Names, publicAddrs())
	}
	s.Next = next(o.file)
	if err := writeNew(o.file, s.Config, o.force || old != nil); err != nil {
		return err
	}
	if o.asJSON {
		return printJSON(cmd, s)
	}
	printStarted(terminal{cmd.OutOrStdout()}, s)
	return nil
}

// next is the command that brings a new configuration into force. A file in the unit's place is for the unit;
// its daemon is started anew, because a reload does not change the control section.
func next(file string) string {
	if file == defaultConfig {
		if out, err := exec.Command("systemctl", "cat", "tailsplice.service").Output(); err == nil && len(out) > 0 {
			return "sudo systemctl restart tailsplice"
		}
	}
	return "sudo tailsplice run --config " + file
}

// askPerson asks for what no flag has said. An empty line takes what stands in brackets.
func askPerson(w io.Writer, r io.Reader, role *role, a *answers) {
	lines := bufio.NewScanner(r)
	line := func(question, def string) string {
		fmt.Fprintf(w, "%s [%s]: ", question, def)
		if lines.Scan() && strings.TrimSpace(lines.Text()) != "" {
			return strings.TrimSpace(lines.Text())
		}
		return def
	}
	if len(a.Names) == 0 {
		a.Names = strings.FieldsFunc(line("Host names that browsers ask for", ""), func(c rune) bool {
			return c == ',' || c == ' '
		})
	}
	if a.Forward == "" {
		a.Forward = line("Where they lead to", role.forward)
	}
	if role.email && a.Email == "" {
		a.Email = line("Your address for the certificate authority", "")
	}
}

// writeNew writes a file that is not there, whole or not at all; with force also over one that is.
func writeNew(file, text string, force bool) error {
	unless := os.O_EXCL
	if force {
		unless = os.O_TRUNC
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|unless, 0o644)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: make its folder first, or name another file with --config", err)
	} else if err != nil {
		return err
	}
	_, err = io.WriteString(f, text)
	return errors.Join(err, f.Close())
}

// lookAround says what of this machine matters to a role, and where an edge's names lead to.
func lookAround(ctx context.Context, r *role, names []string) []loader.Finding {
	found := []loader.Finding{findNode(ctx, "install Tailscale, then: sudo tailscale up --advertise-tags=tag:"+r.name)}
	look := func(name, advice string, ask func(context.Context) (string, error)) {
		found = append(found, find(ctx, name, advice, ask))
	}
	if r.name == "laptop" {
		found = append(found, findDocker(ctx))
	}
	for _, port := range r.ports {
		look(fmt.Sprintf("port %d", port), "stop what listens there, or change listen in the file",
			func(context.Context) (string, error) {
				ln, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
				if errors.Is(err, fs.ErrPermission) {
					return "could not be tried without root", nil
				} else if err != nil {
					return "", err
				}
				return "is free", ln.Close()
			})
	}
	if r.name != "edge" {
		return found
	}
	ctx, cancel := context.WithTimeout(ctx, askPatience) // for all names
	defer cancel()
	for _, n := range names {
		if !strings.HasPrefix(n, "*.") {
			look("name "+n, "make the DNS records below", func(ctx context.Context) (string, error) { return leadsHere(ctx, n) })
		}
	}
	return found
}

// leadsHere looks up whether a name leads to this machine.
func leadsHere(ctx context.Context, name string) (string, error) {
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", name)
	if err != nil {
		return "", err
	}
	own := publicAddrs()
	for i, a := range addrs {
		addrs[i] = a.Unmap()
		if slices.Contains(own, addrs[i]) {
			return "leads to this machine", nil
		}
	}
	text := fmt.Sprintf("leads to %s", strings.Trim(fmt.Sprint(addrs), "[]"))
	if len(own) == 0 {
		return text + "; this machine can't tell whether that is its own public address", nil
	}
	return "", fmt.Errorf("%s, which is not this machine", text)
}

// publicAddrs are this machine's addresses that the internet may reach.
func publicAddrs() (public []netip.Addr) {
	addrs, _ := net.InterfaceAddrs()
	for _, a := range addrs {
		if ip := addrOf(a); ip.IsGlobalUnicast() && !ip.IsPrivate() && !tailnet.Contains(ip) {
			public = append(public, ip)
		}
	}
	return public
}

// records are what DNS has to say of names.
func records(names []string, addrs []netip.Addr) []string {
	out := []string{}
	for _, n := range names {
		if len(addrs) == 0 {
			out = append(out, n+". A THIS-EDGE'S-PUBLIC-IPV4")
		}
		for _, a := range addrs {
			class := "A"
			if a.Is6() {
				class = "AAAA"
			}
			out = append(out, fmt.Sprintf("%s. %s %s", n, class, a))
		}
	}
	return out
}

func printStarted(w io.Writer, s started) {
	var b strings.Builder
	fmt.Fprintf(&b, "%s is written.\n\n%s\nThis machine:\n", s.File, s.Config)
	for _, f := range s.Machine {
		fmt.Fprintf(&b, "  %s: %s\n", f.Name, f.Detail)
		if f.State != loader.StateOK && f.Advice != "" {
			fmt.Fprintf(&b, "    → %s\n", f.Advice)
		}
	}
	fmt.Fprintf(&b, "\nAdd this to the tailnet's policy, without the rule that allows all:\n  %s\n", s.Policy)
	if len(s.DNS) > 0 {
		fmt.Fprintf(&b, "\nDNS records to make:\n  %s\n", strings.Join(s.DNS, "\n  "))
	}
	fmt.Fprintf(&b, "\nThen:\n  %s\n", s.Next)
	io.WriteString(w, b.String())
}
