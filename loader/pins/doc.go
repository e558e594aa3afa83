// Package pins keeps a daemon's maps in the BPF file system, by generation, and removes what daemons left
// that were killed.
package pins
