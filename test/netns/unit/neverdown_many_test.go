//go:build soak

package unit

const neverDownFlows, neverDownUpgrades, neverDownReloads, neverDownKills = 2000, 10, 20, 3
