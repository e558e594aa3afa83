package oracle

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// Grammar makes messages of what means something to those who read them.
type Grammar struct {
	Hosts  []string // names, the first of which plain messages are for
	Paths  []string // each begins with a slash and has no other; the first as with Hosts
	Names  []string // of headers
	Values []string // of headers; hosts and paths come beside them
	Seeds  *Seeds   // nil for none
}

// Plain is a message with which nothing is wrong.
func (g *Grammar) Plain() *Message {
	return &Message{Method: "GET", Target: g.Paths[0], Hosts: []string{g.Hosts[0]}}
}

// Message makes a message. Without choices it is the plain one.
func (g *Grammar) Message(c *Choices) *Message {
	m := g.Plain()
	if c.Percent(50) {
		m.Hosts[0] = g.host(c)
	}
	if c.Percent(50) {
		m.Target = g.path(c)
	}
	for range Pick(c, 0, 1, 1, 1, 2, 2, 3) {
		change := changes[c.Int(len(changes))]
		change(g, c, m)
	}
	return m
}

// Each of the grammar's rules changes a message. Those that are here more than once happen as often.
var changes = []func(*Grammar, *Choices, *Message){
	(*Grammar).changePath, (*Grammar).changePath, (*Grammar).changePath,
	(*Grammar).changeTarget, (*Grammar).changeTarget,
	(*Grammar).changeHost, (*Grammar).changeHost,
	(*Grammar).changeHosts,
	(*Grammar).addField, (*Grammar).addField,
	(*Grammar).addBody,
	(*Grammar).changeFraming,
	(*Grammar).changeMethod,
	(*Grammar).changeVersion,
	(*Grammar).changeFrames,
	(*Grammar).changeBytes,
	(*Grammar).upgrade,
	(*Grammar).follow,
	(*Grammar).fromSeed, (*Grammar).fromSeed,
}

func (g *Grammar) host(c *Choices) string { return Pick(c, g.Hosts...) }
func (g *Grammar) path(c *Choices) string { return Pick(c, g.Paths...) }

// pathTokens stand between the segments of paths.
var pathTokens = []string{"/", "/", "..", "..", ".", "//", "%2f", "%2F", "%2e", "%2E", "%5c", `\`, ";", ";x",
	"x", "%", "%25", "%252f",
	"%252e", "%00", "%0a", "%20", "%23", "#", "%3f", "?", "%3b", "%c0%af", "%c0%ae", "\x80", "\xc3\xa9", " ",
	"\t", "|", "~", ":", "@", "*", "+", "&", "=", "%u002f", "\x7f"}

func (g *Grammar) changePath(c *Choices, m *Message) {
	around := func(most int) (s string) {
		for range c.Int(most + 1) {
			if c.Percent(25) {
				s += g.path(c)
			} else {
				s += Pick(c, pathTokens...)
			}
		}
		return s
	}
	switch c.Int(8) {
	case 6, 7: // segments, divided by what some take for a slash
		m.Target = ""
		for range 2 + c.Int(4) {
			m.Target += Pick(c, "/", "/", "/", "%2f", `\`, "%5c", "//", ";/", "/;x/", "%252f") +
				Pick(c, "..", "..", strings.TrimPrefix(g.path(c), "/"), "x", ".", "%2e%2e", "")
		}
	case 0, 1, 2:
		m.Target = g.path(c) + around(4)
	case 3:
		m.Target = "/" + around(4) + g.path(c) + around(2)
	case 4: // other writings of the same path
		m.Target = spelled(c, m.Target)
	case 5:
		at := c.Int(len(m.Target) + 1)
		m.Target = m.Target[:at] + Pick(c, pathTokens...) + m.Target[at:]
	}
}

// spelled writes some characters as escapes, once or twice, or in the other case.
func spelled(c *Choices, s string) string {
	var b strings.Builder
	for i := range len(s) {
		ch := s[i]
		switch {
		case c.Percent(20):
			fmt.Fprintf(&b, Pick(c, "%%%02x", "%%%02X", "%%25%02x"), ch)
		case c.Percent(5) && (ch|0x20 >= 'a' && ch|0x20 <= 'z'):
			b.WriteByte(ch ^ 0x20)
		default:
			b.WriteByte(ch)
		}
	}
	return b.String()
}

var schemes = []string{"http:", "https:", "HTTP:", "x:", "ftp:", "ws:", "", "http", "file:"}

func (g *Grammar) changeTarget(c *Choices, m *Message) {
	switch c.Int(5) {
	case 0:
		m.Target = Pick(c, "*", "", "/", g.host(c), g.host(c)+":443", "?x", "x", ".", "http:")
	case 1:
		m.Target = strings.TrimPrefix(m.Target, "/")
	case 2:
		m.Target = Pick(c, schemes...) + m.Target
	default:
		authority := Pick(c, g.host(c), g.odd(c, g.host(c)), "")
		m.Target = Pick(c, "", "", Pick(c, schemes...)) + Pick(c, schemes...) +
			Pick(c, "//", "//", "/", "", "///", `\\`) + authority +
			Pick(c, m.Target, g.path(c), "?x", "", "#"+m.Target)
	}
}

// odd writes a host in another way, which is right or not.
func (g *Grammar) odd(c *Choices, host string) string {
	switch c.Int(8) {
	case 0, 1, 2:
		for range 1 + c.Int(3) {
			host += Pick(c, ":80", ":", ":443", ":0", ":1", ":8a", ":-1", ":99999", ":00080", ".", " ", "\t",
				"/", "#", "?", ",", ";", "%00", "@", `\`)
		}
	case 3:
		host = Pick(c, "me@", "me:pw@", g.host(c)+"@", " ", ".", "[", "//", "http://", "\t", ":", "*.",
			"%20") + host
	case 4:
		host = "[" + host + "]" + Pick(c, "", ":80")
	case 5:
		host = host + Pick(c, ",", ", ", " ", "@", ";", "/", "\x00", "\\") + g.host(c)
	case 6:
		at := c.Int(len(host) + 1)
		host = host[:at] + Pick(c, "%", "\xc3\xa9", "\xe3\x80\x82", "\xff", "%2e", "\u00ad", "..", "_",
			"\x01", "\u017f", "\u212a") + host[at:]
	case 7:
		host = spelled(c, host)
	}
	return host
}

func (g *Grammar) changeHost(c *Choices, m *Message) {
	if len(m.Hosts) > 0 {
		m.Hosts[c.Int(len(m.Hosts))] = g.odd(c, g.host(c))
	}
}

func (g *Grammar) changeHosts(c *Choices, m *Message) {
	switch c.Int(5) {
	case 0, 1:
		m.Hosts = append(m.Hosts, g.host(c))
	case 2:
		m.Hosts = slices.Insert(m.Hosts, 0, g.host(c))
	case 3:
		m.Hosts = nil
	case 4:
		m.Hosts = append(m.Hosts, g.odd(c, g.host(c)))
	}
}

// Name is the name of a header, or one that some take for it.
func (g *Grammar) Name(c *Choices) string {
	name := Pick(c, g.Names...)
	switch c.Int(5) {
	case 1, 2:
		name = strings.ReplaceAll(name, "-", Pick(c, "_", ".", "~", "!", "+", "--", "$", "'", "^", "|", "*",
			"#", "&", "`", "%2d", ""))
	case 3:
		if c.Percent(50) {
			name = strings.Replace(name, "-", Pick(c, "_", ".", "~"), 1)
		} else {
			name = strings.ToUpper(name)
		}
	case 4:
		at := c.Int(len(name) + 1)
		name = name[:at] + Pick(c, " ", "\t", "\x00", ":", "\xc3\xa9", "\x7f", "\x80", "_", ".", "\r",
			"\n") + name[at:]
	}
	return name
}

func (g *Grammar) value(c *Choices) string {
	switch c.Int(4) {
	case 1:
		return g.host(c)
	case 2:
		return g.path(c)
	case 3:
		return Pick(c, "http://", "/", " ", "") + g.host(c) + g.path(c)
	}
	return Pick(c, g.Values...)
}

func (g *Grammar) addField(c *Choices, m *Message) {
	f := Field{g.Name(c), g.value(c)}
	if c.Percent(10) { // a line is folded, or there are two
		f.Value = Pick(c, "x\r\n ", "\r\n\t", "x\r\n", "x\n", "x\r", "\n ", "\x00", "\x0b") + f.Value
	}
	if c.Percent(10) {
		m.Fields = append(m.Fields, Field{"Connection", Pick(c, f.Name, "close", "keep-alive", "Host", "TE",
			"X-Forwarded-For", "Content-Length", "Authorization")})
	}
	if c.Percent(50) {
		m.Fields = append(m.Fields, f)
	} else {
		m.Fields = slices.Insert(m.Fields, 0, f)
	}
}

func (g *Grammar) addBody(c *Choices, m *Message) {
	m.Method = Pick(c, "POST", "PUT", "GET", "DELETE")
	m.Body = []byte(Pick(c, "x=1", "", strings.Repeat("b", 1<<c.Int(16)), string(g.request(c))))
	m.Chunked = c.Percent(50)
	if m.Chunked && c.Percent(50) {
		for range 1 + c.Int(2) {
			f := Field{g.Name(c), g.value(c)}
			if c.Percent(30) {
				f.Name = Pick(c, "Host", "Content-Length", "Transfer-Encoding", "Authorization", "Cookie",
					":path", ":authority", "Connection", "TE", "Expect")
			}
			m.Trailer = append(m.Trailer, f)
		}
	}
	if c.Percent(10) {
		m.Fields = append(m.Fields, Field{"Expect", Pick(c, "100-continue", "100-Continue", "x")})
	}
}

// changeFraming says of the body what is not so. What it takes for the next request is one.
func (g *Grammar) changeFraming(c *Choices, m *Message) {
	f := Field{"Transfer-Encoding", Pick(c, "chunked", "Chunked", "identity", "gzip, chunked",
		"chunked, identity", "x", "\tchunked", "chunked\t", "\x0bchunked", "", "chunked, chunked",
		`"chunked"`)}
	switch c.Int(4) {
	case 1, 2:
		f = Field{"Content-Length", Pick(c, "0", "1", "+1", "-1", "4", "0x4", "1, 1", "1,2", "", " 4", "4 ",
			"4\t", "1_0", "44", "00", "18446744073709551616")}
	case 3:
		f.Name = Pick(c, "Transfer_Encoding", "Transfer-Encoding ", " Transfer-Encoding",
			"transfer-encoding", "Transfer.Encoding", "Content_Length", "TE", "Content-Length ")
	}
	m.Fields = append(m.Fields, f)
	if m.Body == nil && c.Percent(70) {
		m.Body, m.Chunked = g.request(c), c.Percent(50)
	}
}

// request is a whole request, for where none should be.
func (g *Grammar) request(c *Choices) []byte {
	m := &Message{Method: "GET", Target: g.path(c), Hosts: []string{g.host(c)},
		Fields: []Field{{"Connection", "close"}}}
	return append([]byte(Pick(c, "", "0\r\n\r\n", "\r\n", "\r\n\r\n", "1\r\nx\r\n0\r\n\r\n", "0\r\n")),
		m.HTTP1()...)
}

func (g *Grammar) changeMethod(c *Choices, m *Message) {
	m.Method = Pick(c, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodOptions,
		http.MethodConnect, http.MethodTrace, http.MethodDelete, "PRI", "get", "PROPFIND", "X", "", "GET ",
		" GET",
		"GET /\x20", "G\x00T", "M-SEARCH", "GET "+g.path(c)+" HTTP/1.1\r\nHost: "+g.host(c)+"\r\n\r\nGET",
		"COPY", "G_T", "GET\t")
}

func (g *Grammar) changeVersion(c *Choices, m *Message) {
	m.Version = Pick(c, "HTTP/1.0", "HTTP/1.1 ", "HTTP/1.2", "HTTP/0.9", "HTTP/2.0", "http/1.1", "HTTP/1.10",
		"HTTP/01.1", "", "x", "HTTP/1.1\t", g.path(c)+" HTTP/1.1", " HTTP/1.1",
		"HTTP/1.0\r\nHost: "+g.host(c))
	m.Scheme = Pick(c, "", "http", "https", "HTTP", "ftp", "x", "http://"+g.host(c)+"/",
		"https://"+g.host(c)+g.path(c)+"?", " ", "ws")
}

func (g *Grammar) changeFrames(c *Choices, m *Message) {
	switch c.Int(6) {
	case 0:
		m.Pseudo = append(m.Pseudo, Field{":path", g.path(c)})
	case 1:
		m.Pseudo = append(m.Pseudo, Field{":authority", g.host(c)})
	case 2:
		m.Pseudo = append(m.Pseudo, Field{Pick(c, ":method", ":scheme", ":protocol", ":status", ":host",
			":x", ":Path", ":"), Pick(c, "GET", "http", "websocket", "200", g.host(c), g.path(c))})
	case 3:
		m.Late = true
	case 4:
		m.NoPath = true
	case 5:
		m.AsItIs = true
		m.Fields = append(m.Fields, Field{Pick(c, "HOST", "Host", "host", ":Authority", "HOST "), g.host(c)})
	}
	if c.Percent(30) {
		m.Split, m.Padding, m.Priority = []int{c.Int(256), c.Int(256)}, byte(c.Int(64)), c.Percent(50)
	}
}

func (g *Grammar) changeBytes(c *Choices, m *Message) {
	for range 1 + c.Int(2) {
		m.Edits = append(m.Edits, Edit{At: c.Int(256), Cut: Pick(c, 0, 0, 0, 1, 2, c.Int(16)),
			Put: Pick(c, "\r\n ", "\r\n\t", "\n", "\r", "\x00", " ", "\t", "\x0b", "\x0c", "\r\n",
				"\r\n\r\n", ":", "\x7f", "\xff", "\xc2\x85", "\xc2\xa0", "", "\n\n",
				"\r\nHost: "+g.host(c)+"\r\n", "\nHost: "+g.host(c)+"\n", " "+g.path(c),
				string(rune(c.Int(256))))})
	}
}

// upgrade asks for another protocol, and speaks it at once.
func (g *Grammar) upgrade(c *Choices, m *Message) {
	token := Pick(c, "h2c", "H2C", "websocket", "h2c, websocket", "websocket,h2c", "h2", "TLS/1.0", "h2c/1",
		"\th2c", "x", "HTTP/2.0")
	m.Fields = append(m.Fields, Field{"Connection", Pick(c, "Upgrade, HTTP2-Settings", "upgrade", "Upgrade",
		"HTTP2-Settings", "keep-alive, Upgrade")}, Field{Pick(c, "Upgrade", "upgrade", "Upgrade "), token})
	if strings.Contains(strings.ToLower(token), "h2") {
		m.Fields = append(m.Fields, Field{"HTTP2-Settings", Pick(c, "AAMAAABkAAQAoAAAAAIAAAAA", "",
			"AAMAAABk")})
	} else {
		m.Fields = append(m.Fields, Field{"Sec-WebSocket-Version", Pick(c, "13", "7")},
			Field{"Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="})
	}
	if c.Percent(70) {
		next := &Message{Method: "GET", Target: g.path(c), Hosts: []string{g.host(c)}}
		if c.Percent(70) {
			m.After = append(m.After, AsHTTP2(next)...)
		} else {
			next.Fields = []Field{{"Connection", "close"}}
			m.After = append(m.After, next.HTTP1()...)
		}
	}
}

// follow puts another request behind the message, which is as strange as this one.
func (g *Grammar) follow(c *Choices, m *Message) {
	next := g.Plain()
	next.Hosts[0], next.Target = g.host(c), g.path(c)
	if c.Percent(50) {
		g.changeFraming(c, m)
	}
	if c.Percent(50) {
		g.changePath(c, next)
	}
	next.Fields = append(next.Fields, Field{"Connection", "close"})
	m.After = append([]byte(Pick(c, "", "\r\n", "\n", "\x00", " ", "0\r\n\r\n", "GET ", "x")),
		next.HTTP1()...)
}
