//go:build !soak

package unit

import "time"

// A daemon's hour in a minute: with -tags soak it has more to bear.
const (
	neverDownFlows, neverDownRequests                   = 120, 32
	neverDownUpgrades, neverDownReloads, neverDownKills = 2, 2, 2

	// neverDownUsual is the least that counts as usual for a new connection: of so short a time a p99 is a few of them.
	neverDownUsual = 200 * time.Millisecond
)
