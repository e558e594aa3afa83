package vhost

import (
	"fmt"
	"net/http"
	"slices"
	"strings"

	"golang.org/x/net/http/httpguts"
)

// readUpgrade makes one line of the protocols that r offers to change to. Where h2c is among them nothing is
// offered: in such a connection with the upstream no route would be looked up any more. A server may ignore
// what is offered, and has to in HTTP/1.0 (RFC 9110 7.8).
func readUpgrade(r *http.Request) {
	if r.Header["Upgrade"] == nil {
		return
	}
	offers := splitList(r.Header["Upgrade"])
	h2c := containsFold(offers, "h2c")
	if h2c {
		delete(r.Header, "Http2-Settings")
	}
	if h2c || len(offers) == 0 || r.ProtoMajor != 1 || r.ProtoMinor == 0 {
		delete(r.Header, "Upgrade")
		return
	}
	r.Header["Upgrade"] = []string{strings.Join(offers, ", ")}
}

func wantsUpgrade(r *http.Request) bool {
	return r.Header["Upgrade"] != nil && httpguts.HeaderValuesContainsToken(r.Header["Connection"], "upgrade")
}

// upgrading makes of an upstream's 101 one that ReverseProxy takes: it wants to see the whole list that was
// offered, not the one protocol that the upstream chose. The client gets what was said, see response.Header.
func (x *exchange) upgrading(h http.Header) error {
	offered, chosen := x.req.Header["Upgrade"], h["Upgrade"]
	if !wantsUpgrade(x.req) || len(chosen) != 1 || !containsFold(splitList(offered), chosen[0]) {
		err := fmt.Errorf("the upstream changed to %q, and %q was offered", chosen, offered)
		return Fail(ReasonMalformed, err)
	}
	x.resp.protocol, h["Upgrade"] = chosen, offered
	return nil
}

func containsFold(all []string, s string) bool {
	return slices.ContainsFunc(all, func(v string) bool { return strings.EqualFold(v, s) })
}

// webSocketHeaders are net/http's names and RFC 6455's, where some clients and servers compare by letter.
var webSocketHeaders = [...][2]string{
	{"Sec-Websocket-Accept", "Sec-WebSocket-Accept"},
	{"Sec-Websocket-Extensions", "Sec-WebSocket-Extensions"},
	{"Sec-Websocket-Key", "Sec-WebSocket-Key"},
	{"Sec-Websocket-Protocol", "Sec-WebSocket-Protocol"},
	{"Sec-Websocket-Version", "Sec-WebSocket-Version"},
}

// spellWebSocket spells a header's names as RFC 6455 does.
func spellWebSocket(h http.Header) {
	for _, name := range webSocketHeaders {
		if values := h[name[0]]; values != nil {
			delete(h, name[0])
			h[name[1]] = values
		}
	}
}
