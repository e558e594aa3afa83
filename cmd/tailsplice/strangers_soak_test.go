//go:build soak && linux

package main

import "time"

// Each trick has 8 connections, two from each address. The strangers have their CPUs with the daemon here: with
// more of them it is the machine that has no time left, whatever the daemon does.
func init() {
	strangersGoOn, strangersRounds, strangersConns, strangersSoak = time.Minute, 5, 2, true
	strangersHeap = 16 << 20
}
