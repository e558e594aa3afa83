//go:build race

package deny

const raceEnabled = true
