// Package userspace is empty: it is the folder of the daemon's parts, one
// package a noun. All of them work without a loader, and all but transparent
// work without privileges. Each is a leaf that imports none of the others but
// spelling; package front joins them. The test beside this file enforces that.
package userspace
