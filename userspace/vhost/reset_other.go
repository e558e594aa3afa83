//go:build !linux

package vhost

func cutsOff(error) bool { return true }
