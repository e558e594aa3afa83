package vhost

import (
	"maps"
	"net/http"
)

// sameHeader says whether two names of headers become one variable in CGI, WSGI and what is like them: each
// byte outside of letters and digits is the same there, and letters have no case.
func sameHeader(a, b string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range len(a) {
		if a[i] != b[i] && folded(a[i]) != folded(b[i]) {
			return false
		}
	}
	return true
}

// foldName appends name to buf as sameHeader sees it.
func foldName(buf []byte, name string) []byte {
	for i := range len(name) {
		buf = append(buf, folds[name[i]])
	}
	return buf
}

var folds = func() (all [256]byte) {
	for c := range all {
		all[c] = folded(byte(c))
	}
	return all
}()

func folded(c byte) byte {
	switch {
	case c >= 'A' && c <= 'Z':
		return c | 0x20
	case c >= 'a' && c <= 'z', c >= '0' && c <= '9':
		return c
	}
	return '-'
}

// isPlainName says whether nothing but - stands between a name's letters and digits.
func isPlainName(name string) bool {
	for i := range len(name) {
		if name[i] != '-' && folded(name[i]) == '-' {
			return false
		}
	}
	return true
}

// dropHeader removes a header, however it is written.
func dropHeader(h http.Header, name string) {
	maps.DeleteFunc(h, func(other string, _ []string) bool { return sameHeader(other, name) })
}
