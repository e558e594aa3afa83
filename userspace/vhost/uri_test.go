package vhost

import (
	"bufio"
	"bytes"
	"net/http"
	"net/url"
	"strings"
	"testing"
)

// FuzzURI: whatever a client names, the request that goes out names the same, by one line that has one
// meaning: its target begins with one path, its Host is what routes were looked up by, and reading it again
// gives the same URI.
func FuzzURI(f *testing.F) {
	for _, target := range []string{"/", "/a%2Fb|c?d#", "*", "//x|y", "http://a.test:80/x", "x:http://a.test/", "/%00", "/a b", `/\x`, "/..;/%2e%2e", "https://[::1]:1?", "/\xff"} {
		f.Add("GET", target, "a.test", "", 1)
		f.Add("OPTIONS", target, "A.test.:443", "a.TEST.:443", 2)
	}
	f.Fuzz(func(t *testing.T, method, target, host, second string, major int) {
		in := &http.Request{Method: method, RequestURI: target, Host: host, URL: &url.URL{Opaque: "never", Host: "never.test"}, Header: http.Header{}, ProtoMajor: 1 + major&1, ProtoMinor: 1}
		if second != "" && in.ProtoMajor == 2 {
			in.Header["Host"] = []string{second}
		}
		u, err := readURI(in)
		if err != nil {
			return
		}
		if in.Header["Host"] != nil || in.Host != u.Authority || in.RequestURI != u.String() || in.URL.Opaque+in.URL.Host+in.URL.Scheme != "" || !strings.HasPrefix(u.Plain, "/") {
			t.Fatalf("%q at %q: the request is still for %+v, read was %+v", target, host, in, u)
		}
		out := &http.Request{Method: http.MethodGet, Host: u.Authority, URL: &url.URL{Scheme: "http", Host: "0123", Opaque: "never"}, Header: http.Header{}}
		setTarget(out.URL, u.Path, u.Query)
		var b bytes.Buffer
		if err := out.Write(&b); err != nil {
			t.Fatalf("%+v can't be sent: %v", u, err)
		}
		line, rest, _ := strings.Cut(b.String(), "\r\n")
		sent := u.String()
		if strings.HasPrefix(u.Path, "//") {
			sent = escapeOdd(u.Path) + u.Query
		}
		if line != "GET "+sent+" HTTP/1.1" || !strings.HasPrefix(rest, "Host: "+u.Authority+"\r\n") {
			t.Fatalf("%+v was sent as %q", u, b.String())
		}
		if u.Path == "*" {
			return
		}
		again, err := http.ReadRequest(bufio.NewReader(&b))
		if err != nil {
			t.Fatalf("%+v was sent as something that can't be read: %v", u, err)
		}
		v, err := readURI(again)
		if err != nil || v.Host != u.Host || v.Plain != u.Plain || v.Query != u.Query || routeHost(strings.ToLower(v.Host)) != v.Host {
			t.Fatalf("%+v is read as %+v, %v", u, v, err)
		}
		paths, ok := readings(u.Path)
		if !ok && !isOddPath(u.Path) {
			t.Fatalf("%q is not odd, and is read in too many ways", u.Path)
		}
		for _, p := range paths {
			if !isOddPath(u.Path) && mergeSlashes(p) != u.Plain {
				t.Fatalf("%q is not odd, and is also read as %q", u.Path, p)
			}
		}
	})
}

func TestHostPort(t *testing.T) {
	for authority, want := range map[string]string{
		"a.test": "a.test", "A.Test.": "a.test", "A.test.:8080": "a.test:8080", "192.0.2.1:1": "192.0.2.1:1", "": "",
		"[2001:DB8:0::1]": "[2001:db8::1]", "[2001:db8::1]:443": "[2001:db8::1]:443",
	} {
		u := URI{Authority: authority}
		u.Host, _ = readHost(authority)
		if got := u.HostPort(); got != want {
			t.Errorf("%q: %q, want %q", authority, got, want)
		}
	}
}
