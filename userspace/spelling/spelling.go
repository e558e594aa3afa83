// Package spelling guesses which name was meant by one that nobody has. It imports none of ours, so that its
// siblings may import it. The configuration's keys are guessed by config itself, which knows more of them.
package spelling

// Nearest returns the candidate that the fewest edits turn name into, or "" if
// it would take more than half of name's length, or more than three.
func Nearest(name string, candidates []string) string {
	best, most := "", max(1, min(len(name)/2, 3))
	for _, c := range candidates {
		if d := Distance(name, c); d <= most {
			best, most = c, d-1
		}
	}
	return best
}

// Distance counts the insertions, deletions, replacements and swaps of neighbours that turn a into b
// (the optimal string alignment distance of Damerau and Levenshtein).
func Distance(a, b string) int {
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
