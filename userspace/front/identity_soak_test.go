//go:build soak

package front

// About ten minutes.
const (
	identityLong   = 6000
	identityVisits = 20
)
