//go:build soak && linux

package main

import "time"

func init() {
	strangersGoOn, strangersRounds, strangersConns, strangersSoak = time.Minute, 5, 12, true
	strangersHeap = 16 << 20
}
