//go:build !soak

package unit

// A daemon's hour in a minute: with -tags soak it has more to bear.
const (
	neverDownFlows, neverDownRequests                   = 120, 32
	neverDownUpgrades, neverDownReloads, neverDownKills = 2, 2, 2
)
