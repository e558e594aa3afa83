package oracle

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Wire is a way to speak HTTP.
type Wire struct{ HTTP2, TLS bool }

// Wires are all of them.
var Wires = []Wire{{false, false}, {true, false}, {false, true}, {true, true}}

func (w Wire) String() string {
	name := "h1"
	if w.HTTP2 {
		name = "h2"
	}
	if w.TLS {
		name += " TLS"
	}
	return name
}

// Conn is a client's connection, over which messages go one after the other. It is for one goroutine.
type Conn struct {
	Wire Wire
	// Nudge is how long an answer may take until the client ends its stream, and Patience until it gives up.
	// 0 never ends the stream.
	Nudge, Patience time.Duration
	// Seen is all that came since the last message was sent, decrypted and as it is.
	Seen []byte

	c      net.Conn
	br     *bufio.Reader
	framer *http2.Framer
	enc    *hpack.Encoder
	block  bytes.Buffer
	stream uint32
	broken bool
}

// Answer is what came back for a message.
type Answer struct {
	Status  int // of the final answer; 0 if there is none
	Interim []int
	Header  http.Header
	Body    []byte
	Trailer http.Header
	// Cut is why the answer is not whole, or there is none. The connection is of no use then, but for a
	// *Reset.
	Cut error
}

// Reset is how a stream of HTTP/2 ended.
type Reset struct{ Code http2.ErrCode }

func (r *Reset) Error() string { return "stream reset: " + r.Code.String() }

// Dial connects. With TLS conf names the server and may have a certificate; its protocols are set here.
func Dial(addr string, w Wire, conf *tls.Config) (*Conn, error) {
	d := net.Dialer{Timeout: 10 * time.Second}
	c, err := d.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	conn := &Conn{Wire: w, Patience: 10 * time.Second, c: c}
	c.SetDeadline(time.Now().Add(conn.Patience))
	if w.TLS {
		conf = conf.Clone()
		conf.NextProtos = []string{"http/1.1"}
		if w.HTTP2 {
			conf.NextProtos = []string{"h2"}
		}
		tc := tls.Client(c, conf)
		if err := tc.Handshake(); err != nil {
			c.Close()
			return nil, err
		}
		conn.c = tc
	}
	conn.br = bufio.NewReader(readerFunc(conn.read))
	if w.HTTP2 {
		conn.framer = http2.NewFramer(nil, conn.br)
		conn.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
		conn.enc = hpack.NewEncoder(&conn.block)
		conn.stream = 1
		settings := appendFrame([]byte(http2.ClientPreface), http2.FrameSettings, 0, 0,
			[]byte{0, byte(http2.SettingInitialWindowSize), 0x40, 0, 0, 0, 0, byte(http2.SettingEnablePush),
				0, 0, 0, 0})
		settings = appendFrame(settings, http2.FrameWindowUpdate, 0, 0, []byte{0x40, 0, 0, 0})
		if _, err := conn.c.Write(settings); err != nil {
			conn.c.Close()
			return nil, err
		}
	}
	return conn, nil
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// read reads from the connection, keeps what came, and ends the client's stream where that helps.
func (c *Conn) read(b []byte) (int, error) {
	for nudged := c.Nudge == 0; ; nudged = true {
		wait := c.Patience
		if !nudged {
			wait = c.Nudge
		}
		c.c.SetReadDeadline(time.Now().Add(wait))
		n, err := c.c.Read(b)
		c.Seen = append(c.Seen, b[:n]...)
		var timeout net.Error
		if n > 0 || nudged || !errors.As(err, &timeout) || !timeout.Timeout() {
			return n, err
		}
		c.broken = true
		c.c.(interface{ CloseWrite() error }).CloseWrite()
	}
}

// Close closes the connection.
func (c *Conn) Close() error { return c.c.Close() }

// Usable says whether another message may follow.
func (c *Conn) Usable() bool { return !c.broken }

// Do sends a message and waits for the answer to it, and to what comes after it.
func (c *Conn) Do(m *Message) Answer {
	c.Seen = c.Seen[:0]
	c.c.SetWriteDeadline(time.Now().Add(c.Patience))
	var a Answer
	if c.Wire.HTTP2 {
		a = c.doHTTP2(m)
	} else {
		a = c.doHTTP1(m)
	}
	var reset *Reset
	if a.Cut != nil && !errors.As(a.Cut, &reset) {
		c.broken = true
	}
	return a
}

func (c *Conn) doHTTP1(m *Message) (a Answer) {
	// An answer may come, and the connection be reset, before all is written: the answer counts.
	_, writeErr := c.c.Write(append(m.HTTP1(), m.After...))
	for {
		res, err := http.ReadResponse(c.br, &http.Request{Method: m.Method})
		if err != nil {
			a.Cut = errors.Join(err, writeErr)
			return a
		}
		if res.StatusCode/100 == 1 && res.StatusCode != http.StatusSwitchingProtocols {
			a.Interim = append(a.Interim, res.StatusCode)
			continue
		}
		a.Status, a.Header = res.StatusCode, res.Header
		if res.StatusCode == http.StatusSwitchingProtocols {
			c.broken = true
		} else {
			a.Body, a.Cut = io.ReadAll(res.Body)
			a.Trailer = res.Trailer
		}
		c.broken = c.broken || res.Close
		break
	}
	if m.After != nil {
		io.Copy(io.Discard, c.br)
		c.broken = true
	} else if c.br.Buffered() > 0 { // an answer that nobody asked for
		c.broken = true
	}
	return a
}

func (c *Conn) doHTTP2(m *Message) (a Answer) {
	stream := c.stream
	c.stream += 2
	scheme := "http"
	if c.Wire.TLS {
		scheme = "https"
	}
	_, writeErr := c.c.Write(m.HTTP2(stream, scheme, c.enc, &c.block))
	for {
		frame, err := c.framer.ReadFrame()
		if err != nil {
			a.Cut = errors.Join(err, writeErr)
			return a
		}
		switch f := frame.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				c.c.Write(appendFrame(nil, http2.FrameSettings, http2.FlagSettingsAck, 0, nil))
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				c.c.Write(appendFrame(nil, http2.FramePing, http2.FlagPingAck, 0, f.Data[:]))
			}
		case *http2.GoAwayFrame:
			c.broken = true
			if f.LastStreamID < stream || f.ErrCode != http2.ErrCodeNo {
				a.Cut = fmt.Errorf("going away: %s", f.ErrCode)
				return a
			}
		}
		if frame.Header().StreamID != stream {
			continue
		}
		switch f := frame.(type) {
		case *http2.MetaHeadersFrame:
			header := http.Header{}
			for _, field := range f.RegularFields() {
				header.Add(field.Name, field.Value)
			}
			var status int
			fmt.Sscan(f.PseudoValue("status"), &status)
			switch {
			case status/100 == 1:
				a.Interim = append(a.Interim, status)
				c.Seen = fmt.Appendf(c.Seen, " %v ", header)
				continue
			case status == 0:
				a.Trailer = header
			default:
				a.Status, a.Header = status, header
			}
			c.Seen = fmt.Appendf(c.Seen, " %v ", header) // what was compressed
			if f.StreamEnded() {
				return a
			}
		case *http2.DataFrame:
			a.Body = append(a.Body, f.Data()...)
			if f.StreamEnded() {
				return a
			}
		case *http2.RSTStreamFrame:
			if a.Status == 0 || f.ErrCode != http2.ErrCodeNo {
				a.Cut = &Reset{f.ErrCode}
			}
			return a
		}
	}
}
