//go:build !soak

package unit

// A daemon's hour in a minute: with -tags soak it has more to bear.
const neverDownFlows, neverDownUpgrades, neverDownReloads, neverDownKills = 120, 2, 2, 2
