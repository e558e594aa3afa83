//go:build !soak

package relaytest

// numberOf programs in each hands, always the same ones. With -tags soak there are more, and others each
// time.
const numberOf = 150

func seedOf() uint64 { return 1 }
