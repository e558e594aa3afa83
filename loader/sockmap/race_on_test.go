//go:build race

package sockmap

const raceEnabled = true
