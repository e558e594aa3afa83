//go:build !soak

package server

// How much of the table TestIdentity goes through: chains of three and four hops, and visits to each chain.
const (
	identityLong   = 600
	identityVisits = 1
)
