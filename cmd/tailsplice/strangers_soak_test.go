//go:build soak && linux

package main

import (
	"flag"
	"time"
)

// Each trick has 8 connections, two from each address. The strangers have their CPUs with the daemon here: with
// more of them it is the machine that has no time left, whatever the daemon does.
func init() {
	flag.DurationVar(&strangersGoOn, "strangers", time.Minute, "how long strangers go on at a time, in TestStrangers")
	flag.IntVar(&strangersRounds, "rounds", 5, "how often they do")
	flag.IntVar(&strangersConns, "connections", 2, "how many they have for each trick and address")
	strangersSoak, strangersHeap = true, 16<<20
}
