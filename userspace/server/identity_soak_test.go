//go:build soak

package server

// About ten minutes.
const (
	identityLong   = 6000
	identityVisits = 20
)
