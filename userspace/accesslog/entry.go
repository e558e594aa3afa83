package accesslog

import (
	"encoding/json"
	"net/netip"
	"strconv"
	"time"
	"unicode/utf8"
)

// Entry is what is written of a request. Texts may be anything: each format
// escapes what could end a line or command a terminal.
type Entry struct {
	Time      time.Time // when the request came
	ID        string    // the path's id
	RequestID string    // X-Request-Id, as the upstream got it
	Node      string    // this hop
	Listener  string
	Client    netip.Addr // as far back as it is believed; invalid if unknown
	User      string     // who it is, "" if nobody asked
	Method    string
	Host      string
	URI       string // as the client sent it
	Proto     string
	Status    int
	BytesUp   int64 // of the request's body
	BytesDown int64 // of the answer's body
	Duration  time.Duration
	Referer   string
	UserAgent string
	Route     string // "" if none took it
	Target    string
	Upstream  string // the address of the upstream connection
	Err       string
}

// longest is how much of one text is written.
const longest = 8 << 10

// formatVersion is raised as flow.FormatVersion is, whose value it has.
const formatVersion = 1

// appendJSON writes e as one JSON object. Keys without a value are left out,
// but those that every request has.
func appendJSON(b []byte, e *Entry) []byte {
	b = append(b, `{"time":"`...)
	b = e.Time.UTC().AppendFormat(b, time.RFC3339Nano)
	b = append(b, '"')
	b = strconv.AppendInt(append(b, `,"format_version":`...), formatVersion, 10)
	text := func(key, v string, always bool) {
		if v == "" && !always {
			return
		}
		b = append(b, `,"`...)
		b = append(b, key...)
		b = append(b, `":`...)
		b = appendString(b, v)
	}
	number := func(key string, v int64) {
		b = append(b, `,"`...)
		b = append(b, key...)
		b = append(b, `":`...)
		b = strconv.AppendInt(b, v, 10)
	}
	text("id", e.ID, false)
	text("request_id", e.RequestID, false)
	text("node", e.Node, false)
	text("listener", e.Listener, true)
	text("client", client(e), true)
	text("user", e.User, false)
	text("method", e.Method, true)
	text("host", e.Host, true)
	text("uri", e.URI, true)
	text("proto", e.Proto, true)
	number("status", int64(e.Status))
	number("bytes_up", e.BytesUp)
	number("bytes_down", e.BytesDown)
	b = append(b, `,"duration":`...)
	b = strconv.AppendFloat(b, e.Duration.Round(time.Microsecond).Seconds(), 'f', -1, 64)
	text("referer", e.Referer, false)
	text("user_agent", e.UserAgent, false)
	text("route", e.Route, false)
	text("target", e.Target, false)
	text("upstream", e.Upstream, false)
	text("err", e.Err, false)
	return append(b, '}', '\n')
}

// appendString writes v as a JSON string. encoding/json leaves DEL and C1, which terminals obey, as they are.
func appendString(b []byte, v string) []byte {
	if len(v) > longest {
		v = v[:longest]
	}
	plain := true
	for i := range len(v) {
		if c := v[i]; c < ' ' || c >= 0x7f || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			plain = false
			break
		}
	}
	if plain {
		b = append(b, '"')
		b = append(b, v...)
		return append(b, '"')
	}
	q, _ := json.Marshal(v) // a string always can be
	for len(q) > 0 {
		r, n := utf8.DecodeRune(q)
		if r >= 0x7f && r < 0xa0 {
			const hex = "0123456789abcdef"
			b = append(b, '\\', 'u', '0', '0', hex[r>>4], hex[r&15])
		} else {
			b = append(b, q[:n]...)
		}
		q = q[n:]
	}
	return b
}

// appendCommon is Apache's: %h %l %u %t "%r" %>s %b.
func appendCommon(b []byte, e *Entry) []byte { return append(common(b, e), '\n') }

// appendCombined adds "%{Referer}i" "%{User-agent}i".
func appendCombined(b []byte, e *Entry) []byte {
	b = common(b, e)
	b = append(b, ` "`...)
	b = appendEscaped(b, orDash(e.Referer), false)
	b = append(b, `" "`...)
	b = appendEscaped(b, orDash(e.UserAgent), false)
	return append(b, '"', '\n')
}

func common(b []byte, e *Entry) []byte {
	b = append(b, orDash(client(e))...)
	b = append(b, " - "...)
	b = appendEscaped(b, orDash(e.User), true)
	b = e.Time.AppendFormat(b, " [02/Jan/2006:15:04:05 -0700] \"")
	b = appendEscaped(b, e.Method, true)
	b = append(b, ' ')
	b = appendEscaped(b, e.URI, true)
	b = append(b, ' ')
	b = appendEscaped(b, e.Proto, true)
	b = append(b, `" `...)
	b = strconv.AppendInt(b, int64(e.Status), 10)
	b = append(b, ' ')
	if e.BytesDown == 0 {
		return append(b, '-')
	}
	return strconv.AppendInt(b, e.BytesDown, 10)
}

// appendEscaped escapes as Apache and nginx do: \" \\ and \xhh for bytes that
// are not printable ASCII. spaces says that a space would end the field.
func appendEscaped(b []byte, v string, spaces bool) []byte {
	if len(v) > longest {
		v = v[:longest]
	}
	for i := range len(v) {
		switch c := v[i]; {
		case c == '"' || c == '\\':
			b = append(b, '\\', c)
		case c < ' ' || c >= 0x7f || c == ' ' && spaces:
			const hex = "0123456789abcdef"
			b = append(b, '\\', 'x', hex[c>>4], hex[c&15])
		default:
			b = append(b, c)
		}
	}
	return b
}

func client(e *Entry) string {
	if !e.Client.IsValid() {
		return ""
	}
	return e.Client.String()
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
