//go:build soak

package unit

const (
	neverDownFlows, neverDownRequests                   = 1600, 400
	neverDownUpgrades, neverDownReloads, neverDownKills = 10, 20, 3

	neverDownUsual = 0
)
