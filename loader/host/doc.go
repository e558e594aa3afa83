// Package host says what this machine's kernel is, has and lacks: its version, which of them are refused,
// what the datapaths need of it, and what a process may do.
//
//	finding.go      what was found, for people
//	kernel.go       which versions are refused
//	probe_linux.go  what this machine has and lacks
package host
