//go:build !linux

package main

// inBackground is do: there is no datapath to load.
func inBackground(do func()) { do() }
