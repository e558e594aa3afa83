// Package spelling guesses which name was meant by one that nobody has. It imports none of ours, so that its
// siblings may import it. The configuration's keys are guessed by config itself, which knows more of them.
package spelling

// Nearest returns the candidate that the fewest edits turn name into, or "" if
// it would take more than half of name's length, or more than three.
func Nearest(name string, candidates []string) string {
	best, most := "", max(1, min(len(name)/2, 3))
	for _, c := range candidates {
		if d := edits(name, c); d <= most {
			best, most = c, d-1
		}
	}
	return best
}

// edits is the Levenshtein distance in bytes.
func edits(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}
