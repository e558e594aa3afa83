//go:build soak

package relaytest

import "math/rand/v2"

const numberOf = 6500

func seedOf() uint64 { return rand.Uint64() }
