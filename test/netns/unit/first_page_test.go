package unit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tailscale/hujson"
	"tailscale.com/ipn/ipnstate"
	"tailscale.com/tailcfg"

	"github.com/tailsplice/tailsplice/test/netns/lab"
)

// What stands for what the lab does not have: Tailscale's installer and control server.
const (
	tailscaledUnit = `[Service]
Type=exec
ExecStart=/usr/sbin/tailscaled --state=/var/lib/tailscale/tailscaled.state --socket=/run/tailscale/tailscaled.sock --port=41641
Environment=TS_NO_LOGS_NO_SUPPORT=true TS_DEBUG_FIREWALL_MODE=nftables TS_DISABLE_PORTMAPPER=1 TS_PANIC_IF_HIT_MAIN_CONTROL=1
RuntimeDirectory=tailscale
StateDirectory=tailscale
`
	installer = `cp /lab-tailscaled /usr/sbin/tailscaled
cp /lab-tailscale /usr/bin/tailscale
cp /lab/tailscaled.service /etc/systemd/system/
systemctl start tailscaled
until [ -S /run/tailscale/tailscaled.sock ]; do sleep 0.02; done # the lab's tailscaled does not notify systemd
`
	standIns = `
curl() {
	case "$*" in
	*https://tailscale.com/install.sh) cat /lab/install.sh ;;
	*) command curl "$@" ;;
	esac
}
tailscale() {
	local verb=$1
	shift
	command tailscale "$verb" --login-server=http://10.99.0.1:8080 "$@"
}
`
	// Home is a host of the lab, which has the daemon and a name in the tailnet, and no systemd.
	homeStandIns = `
sudo() { "$@"; }
apt() { test "$1" = install; }
systemctl() { test "$*" = "restart tailsplice"; }
tailsplice() { %s "$@"; }
tailscale() { verb=$1; shift; %s "$verb" --login-server=http://10.99.0.1:8080 --hostname=home "$@"; }
`
)

// tenMinutes is what a new user may need. It takes about half a minute here.
const tenMinutes = 10 * time.Minute

// TestFirstPage types what docs/install.md says from a bare Debian server to the first page through it, and
// prints how long each line took. Home is a host of the lab; a certificate of the lab's authority stands for
// the one that Let's Encrypt would issue.
func TestFirstPage(t *testing.T) {
	options := lab.Options{NoAnycast: true, NoDocker: true}
	lab.Require(t, options, "systemd-nspawn", "mmdebstrap", "nsenter", "pgrep", "curl")
	tree, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	w := lab.Start(t, options)
	w.EdgeA.Node.Stop() // the server is a node of its own
	tailscaled, err := lab.BuildTailscaled(t.Context(), t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	tailscale, err := lab.BuildTailscale(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{host: w.EdgeA, root: debian(t, "trixie"), standIns: standIns}
	m.start(t, "--volatile=overlay", "--bind=/dev/net/tun", "--bind-ro="+build(t, tree, releases[1])+":/root",
		"--bind-ro="+labFolder(t)+":/lab", "--bind-ro="+tailscaled+":/lab-tailscaled", "--bind-ro="+tailscale+":/lab-tailscale")

	typesAll(t)
	var total time.Duration
	step := func(line string, do func() string) string {
		began := time.Now()
		out := do()
		took := time.Since(began)
		total += took
		t.Logf("%6.2f s  %s", took.Seconds(), line)
		return out
	}
	// own replaces what the page has for examples.
	own := func(text string) string { return strings.ReplaceAll(text, "example.org", lab.Site) }
	edge := func(text string) (out string) {
		for written := range strings.Lines(block(t, text)) {
			line := strings.TrimSpace(own(written))
			out += step("edge:   "+line, func() string { return m.shell(t, "/root", line) })
			ran(t, written)
		}
		return out
	}

	said := edge("tailsplice init edge")
	for _, want := range []string{lab.Site + ". A " + w.EdgeA.IP4.String(), "sudo systemctl restart tailsplice"} {
		if !strings.Contains(said, want) {
			t.Fatalf("init does not say %q:\n%s", want, said)
		}
	}
	hosts := ""
	for _, r := range regexp.MustCompile(`(?m)^ *(\S+)\. (?:A|AAAA) (\S+)$`).FindAllStringSubmatch(said, -1) {
		hosts += r[2] + " " + r[1] + "\n" // in the place of DNS
	}
	if err := w.Client.WriteFile("/etc/hosts", []byte(hosts), 0o644); err != nil {
		t.Fatal(err)
	}
	edge("tailscale up --advertise-tags=tag:edge")

	bin, err := lab.BuildTailsplice(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Home.Sh(t.Context(), "mkdir -p /etc/tailsplice"); err != nil {
		t.Fatal(err)
	}
	for written := range strings.Lines(block(t, "tailsplice init home")) {
		line := own(written)
		step("home:   "+strings.TrimSpace(line), func() string {
			out, err := w.Home.Sh(t.Context(), fmt.Sprintf(homeStandIns, bin, tailscale)+line)
			if err != nil {
				t.Fatal(err)
			}
			return string(out)
		})
		ran(t, written)
	}
	config, err := w.Home.ReadFile(lab.ConfigFile)
	if err == nil {
		err = w.Home.InstallCertificate()
	}
	if err != nil {
		t.Fatal(err)
	}
	w.Home.Tailsplice(t, regexp.MustCompile(`\{ acme: .*\} \}`).ReplaceAllString(string(config),
		"{ files: { cert: "+lab.CertFile+", key: "+lab.KeyFile+" } }"))
	serve(t, w.Home, "127.0.0.1:3000", "hello from home\n")

	page := func() error {
		out, err := w.Client.Command(t.Context(), "sh", "-c", own(block(t, "curl https://"))).Output()
		if err == nil && string(out) != "hello from home\n" {
			err = fmt.Errorf("the page is %q", out)
		}
		return err
	}
	step("client: "+strings.TrimSpace(own(block(t, "curl https://"))), func() string {
		soon(t, page) // home may have to hear of the new node
		return ""
	})
	ran(t, block(t, "curl https://"))
	t.Logf("%6.2f s  from the bare server to the first page, without what people do in a browser", total.Seconds())
	if total > tenMinutes {
		t.Errorf("it took %v from the bare server to the first page, want at most %v", total, tenMinutes)
	}
	edge("tailsplice doctor")
	edge("tailsplice trace")

	fly, err := os.ReadFile(filepath.Join(tree, "deploy/fly/policy.hujson"))
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{
		"policy of init": []byte(regexp.MustCompile(`(?s)\{"tagOwners".*\]\}`).FindString(said)), "policy of docs/fly.md": fly,
	} {
		t.Run(name, func(t *testing.T) { policy(t, w, text, page) })
	}
}

// policy puts a policy's rules into force at home: the page still comes, and nothing else does.
func policy(t *testing.T, w *lab.World, text []byte, page func() error) {
	var printed struct {
		TagOwners map[string][]string
		ACLs      []struct {
			Action, Proto string
			Src, Dst      []string
		}
	}
	text, err := hujson.Standardize(text)
	if err == nil {
		err = json.Unmarshal(text, &printed)
	}
	if err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	st, err := w.Home.Node.Local.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var rules []tailcfg.FilterRule
	for _, a := range printed.ACLs {
		if a.Action != "accept" || len(a.Src) != 1 || len(a.Dst) != 1 || printed.TagOwners[a.Src[0]] == nil ||
			printed.TagOwners["tag:home"] == nil || a.Proto != "" && a.Proto != "tcp" {
			t.Fatalf("this test does not know what %+v allows", a)
		}
		rule := tailcfg.FilterRule{SrcIPs: tagged(st, a.Src[0])}
		ports, ok := strings.CutPrefix(a.Dst[0], "tag:home:")
		if !ok {
			t.Fatalf("%s is not home", a.Dst[0])
		}
		for p := range strings.SplitSeq(ports, ",") {
			port, err := strconv.ParseUint(p, 10, 16)
			if err != nil {
				t.Fatal(err)
			}
			for _, ip := range st.Self.TailscaleIPs {
				rule.DstPorts = append(rule.DstPorts, tailcfg.NetPortRange{IP: ip.String(),
					Ports: tailcfg.PortRange{First: uint16(port), Last: uint16(port)}})
			}
		}
		rules = append(rules, rule)
	}
	if len(rules) == 0 {
		t.Fatalf("nothing is allowed by %s", text)
	}
	other := netip.AddrPortFrom(st.Self.TailscaleIPs[0], 9200)
	serve(t, w.Home, other.String(), "not for edges\n")
	dial := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		c, err := w.EdgeA.Dial(ctx, "tcp", other.String())
		if err == nil {
			c.Close()
		}
		return err
	}
	w.Tailnet.Control.AddRawMapResponse(st.Self.PublicKey, &tailcfg.MapResponse{PacketFilter: tailcfg.FilterAllowAll})
	soon(t, dial) // it is nothing else that keeps the edge away
	// The control server has no policy of its own, and sends another filter when a node changes.
	soon(t, func() error {
		w.Tailnet.Control.AddRawMapResponse(st.Self.PublicKey, &tailcfg.MapResponse{PacketFilter: rules})
		if dial() == nil {
			return errors.New("the edge reaches another port of home")
		}
		return nil
	})
	if err := page(); err != nil {
		t.Error(err)
	}
}

// tagged are the addresses of the nodes with a tag.
func tagged(st *ipnstate.Status, tag string) (ips []string) {
	for _, p := range st.Peer {
		if p.Tags == nil {
			continue
		}
		for _, had := range p.Tags.All() {
			if had == tag {
				for _, ip := range p.TailscaleIPs {
					ips = append(ips, ip.String())
				}
			}
		}
	}
	return ips
}

// labFolder has what is bound to /lab.
func labFolder(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	err := errors.Join(os.WriteFile(filepath.Join(dir, "install.sh"), []byte(installer), 0o644),
		os.WriteFile(filepath.Join(dir, "tailscaled.service"), []byte(tailscaledUnit), 0o644))
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// serve answers each request at an address of a host with a text.
func serve(t *testing.T, h *lab.Host, addr, text string) {
	t.Helper()
	var ln net.Listener
	soon(t, func() (err error) { ln, err = h.Listen("tcp", addr); return err })
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, text) })}
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
}

// soon tries until there is no error.
func soon(t *testing.T, try func() error) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %v", err)
		}
	}
}
