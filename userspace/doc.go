// Package userspace is empty: it is the folder of the daemon's parts, one
// package a noun. All of them work without privileges and without a loader.
// Each is a leaf that imports none of the others; package front joins them.
// The test beside this file enforces that.
package userspace
