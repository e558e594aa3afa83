package config

import "strings"

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
		dist := distance(w, f)
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

// distance counts the insertions, deletions, replacements and swaps of neighbours that turn a into b
// (the optimal string alignment distance of Damerau and Levenshtein).
func distance(a, b string) int {
	s, t := []rune(a), []rune(b)
	before, prev, cur := make([]int, len(t)+1), make([]int, len(t)+1), make([]int, len(t)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := 1; i <= len(s); i++ {
		cur[0] = i
		for j := 1; j <= len(t); j++ {
			cost := 1
			if s[i-1] == t[j-1] {
				cost = 0
			}
			cur[j] = min(prev[j]+1, cur[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && s[i-1] == t[j-2] && s[i-2] == t[j-1] {
				cur[j] = min(cur[j], before[j-2]+1)
			}
		}
		before, prev, cur = prev, cur, before
	}
	return prev[len(t)]
}

// didYouMean returns `, did you mean "x"?` for the nearest candidate, or nothing.
func didYouMean(word string, candidates []string) string {
	if n := nearest(word, candidates); n != "" {
		return `, did you mean "` + n + `"?`
	}
	return ""
}
