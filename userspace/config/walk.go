package config

import (
	"iter"
	"strings"
)

// Actions gives what each listener does with what comes to it, in the order of the file: by each of its
// routes, then by its default.
func (c *Config) Actions() iter.Seq2[*Listener, *Action] {
	return func(yield func(*Listener, *Action) bool) {
		for _, l := range c.Listeners {
			for a := range l.Actions() {
				if !yield(l, a) {
					return
				}
			}
		}
	}
}

// Actions gives what l does by each of its routes, then by its default.
func (l *Listener) Actions() iter.Seq[*Action] {
	return func(yield func(*Action) bool) {
		for _, r := range l.Routes {
			if !yield(&r.Action) {
				return
			}
		}
		if l.Default != nil {
			yield(l.Default)
		}
	}
}

// IsHTTP reports whether l reads requests, and so needs the bytes in this process.
func (l *Listener) IsHTTP() bool { return l.Mode == "http" || l.Mode == "https" }

// AccessLogOf is where the requests to l are written down, or nil.
func (c *Config) AccessLogOf(l *Listener) *AccessLog {
	switch {
	case !l.IsHTTP():
		return nil
	case l.AccessLog != nil:
		return l.AccessLog
	}
	return c.AccessLog
}

// Tailnet is the word that stands for this node's tailnet addresses in an address to listen on.
const Tailnet = "tailnet"

// OnTailnet reports whether an address to listen on is on the tailnet, such as "tailnet:443".
func OnTailnet(listen string) bool { return strings.HasPrefix(listen, Tailnet+":") }
