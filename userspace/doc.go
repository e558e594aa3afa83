// Package userspace is empty: it is the folder of the daemon's parts, one
// package a noun. All of them work without a loader, and all but transparent
// work without privileges. Each stands on a floor and imports only what stands
// below it; the test beside this file has the floors, and enforces them.
package userspace
