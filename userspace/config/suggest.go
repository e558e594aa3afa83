package config

import (
	"strings"

	"github.com/tailsplice/tailsplice/userspace/spelling"
)

// separators drops what people mix up between the words of a name.
var separators = strings.NewReplacer("-", "", "_", "", " ", "")

// nearest returns the candidate that word was probably meant to be, or "". Case, - and _ do not count; of
// the rest about a third may be wrong.
func nearest(word string, candidates []string) string {
	fold := func(s string) string { return separators.Replace(strings.ToLower(s)) }
	w := fold(word)
	if w == "" || len(w) > 64 {
		return ""
	}
	best, bestDist := "", 1+max(1, len(w)/3)
	for _, c := range candidates {
		f := fold(c)
		dist := spelling.Distance(w, f)
		// A plural or an unfinished word is near however long its rest: sockets, connection.
		if len(w) >= 3 && (strings.HasPrefix(f, w) || strings.HasPrefix(w, f)) {
			dist = min(dist, 1)
		}
		if dist < bestDist {
			best, bestDist = c, dist
		}
	}
	return best
}

// didYouMean returns `, did you mean "x"?` for the nearest candidate, or nothing.
func didYouMean(word string, candidates []string) string {
	if n := nearest(word, candidates); n != "" {
		return `, did you mean "` + n + `"?`
	}
	return ""
}
