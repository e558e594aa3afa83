package server

import (
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/ipn"
	"tailscale.com/ipn/ipnstate"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"

	"github.com/tailsplice/tailsplice/userspace/tailnet"
)

// The nodes of the tailnet under test. Edge is a device of the same user as phone.
var tailnetNodes = map[string]node{
	"edge":   {"me@vsq.cz", nil, []string{"100.64.0.3", "fd7a:115c:a1e0::3"}},
	"home":   {"", []string{"tag:home"}, []string{"100.64.0.4", "fd7a:115c:a1e0::4"}},
	"phone":  {"me@vsq.cz", nil, []string{"100.64.0.5", "fd7a:115c:a1e0::5"}},
	"friend": {"friend@vsq.cz", nil, []string{"100.64.0.6", "fd7a:115c:a1e0::6"}},
}

type node struct {
	user  string
	tags  []string
	addrs []string
}

// tailscaled stands in for the LocalAPI of one, for all daemons that start after it.
type tailscaled struct {
	t      *testing.T
	socket string

	mu     sync.Mutex
	server *http.Server
	nodes  map[string]node
	self   []netip.Addr
	state  string
	slow   time.Duration  // each whois takes this long
	asked  map[string]int // whois, by address
	deaf   bool           // it takes requests and doesn't answer
	noBus  bool           // nobody can follow it
	lists  bool           // its status has nodes
	moved  chan struct{}  // closed when the netmap changes
	closed chan struct{}  // closed with the server
}

func startTailscaled(t *testing.T) *tailscaled {
	ts := &tailscaled{t: t, socket: filepath.Join(t.TempDir(), "tailscaled.sock"), nodes: map[string]node{}, self: []netip.Addr{netip.MustParseAddr("100.64.0.1")}, state: ipn.Running.String(), asked: map[string]int{}, moved: make(chan struct{})}
	for name, n := range tailnetNodes {
		ts.nodes[name] = n
	}
	t.Setenv(tailnet.SocketEnv, ts.socket)
	ts.start()
	t.Cleanup(ts.stop)
	return ts
}

func (ts *tailscaled) start() {
	ln, err := net.Listen("unix", ts.socket)
	if err != nil {
		ts.t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/localapi/v0/status", ts.serveStatus)
	mux.HandleFunc("/localapi/v0/whois", ts.serveWhoIs)
	mux.HandleFunc("/localapi/v0/watch-ipn-bus", ts.serveBus)
	ts.mu.Lock()
	ts.server, ts.closed = &http.Server{Handler: mux}, make(chan struct{})
	server := ts.server
	ts.mu.Unlock()
	go server.Serve(ln)
}

func (ts *tailscaled) stop() {
	ts.mu.Lock()
	server := ts.server
	ts.server = nil
	if server != nil {
		close(ts.closed)
	}
	ts.mu.Unlock()
	if server == nil {
		return
	}
	server.Close()
	if err := os.Remove(ts.socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		ts.t.Error(err)
	}
}

// change changes what ts says from now on, and tells who follows it.
func (ts *tailscaled) change(f func()) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	f()
	close(ts.moved)
	ts.moved = make(chan struct{})
}

// times is how often it was asked who has an address.
func (ts *tailscaled) times(addr string) int {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	return ts.asked[addr]
}

// wait takes as long as ts does for an answer, and reports whether there is one.
func (ts *tailscaled) wait(r *http.Request, d time.Duration) bool {
	ts.mu.Lock()
	deaf, closed := ts.deaf, ts.closed
	ts.mu.Unlock()
	if deaf {
		d = time.Hour
	}
	select {
	case <-r.Context().Done():
		return false
	case <-closed:
		return false
	case <-time.After(d):
		return true
	}
}

func (ts *tailscaled) serveStatus(w http.ResponseWriter, r *http.Request) {
	if !ts.wait(r, 0) {
		return
	}
	ts.mu.Lock()
	defer ts.mu.Unlock()
	st := ipnstate.Status{BackendState: ts.state, TUN: true, TailscaleIPs: ts.self,
		CurrentTailnet: &ipnstate.TailnetStatus{MagicDNSSuffix: "tail.ts.net"},
		Self:           &ipnstate.PeerStatus{ID: "self", NodeID: 1, DNSName: "laptop.tail.ts.net.", TailscaleIPs: ts.self}}
	if ts.lists {
		st.Peer = map[key.NodePublic]*ipnstate.PeerStatus{}
		for name, n := range ts.nodes {
			p := &ipnstate.PeerStatus{ID: tailcfg.StableNodeID(name), DNSName: name + ".tail.ts.net."}
			for _, a := range n.addrs {
				p.TailscaleIPs = append(p.TailscaleIPs, netip.MustParseAddr(a))
			}
			st.Peer[key.NewNode().Public()] = p
		}
	}
	json.NewEncoder(w).Encode(st)
}

func (ts *tailscaled) serveWhoIs(w http.ResponseWriter, r *http.Request) {
	addr := r.FormValue("addr")
	ts.mu.Lock()
	ts.asked[addr]++
	slow := ts.slow
	ts.mu.Unlock()
	if !ts.wait(r, slow) {
		return
	}
	ts.mu.Lock()
	defer ts.mu.Unlock()
	for name, n := range ts.nodes {
		for _, a := range n.addrs {
			if a == addr {
				json.NewEncoder(w).Encode(apitype.WhoIsResponse{
					Node:        &tailcfg.Node{Name: name + ".tail.ts.net.", Tags: n.tags, Addresses: []netip.Prefix{netip.PrefixFrom(netip.MustParseAddr(a), netip.MustParseAddr(a).BitLen())}},
					UserProfile: &tailcfg.UserProfile{LoginName: n.user, DisplayName: n.user}})
				return
			}
		}
	}
	http.Error(w, "no match for IP:port", http.StatusNotFound)
}

func (ts *tailscaled) serveBus(w http.ResponseWriter, r *http.Request) {
	ts.mu.Lock()
	closed, noBus := ts.closed, ts.noBus
	ts.mu.Unlock()
	if noBus {
		http.Error(w, "not in this test", http.StatusNotImplemented)
		return
	}
	for {
		ts.mu.Lock()
		moved := ts.moved
		ts.mu.Unlock()
		state := ipn.Running
		json.NewEncoder(w).Encode(ipn.Notify{State: &state}) // whatever it is: status is asked
		w.(http.Flusher).Flush()
		select {
		case <-r.Context().Done():
			return
		case <-closed:
			return
		case <-moved:
		}
	}
}
