//go:build !linux

package front

// watchMemory is for Linux: see memory_linux.go.
func (f *Front) watchMemory() {}
