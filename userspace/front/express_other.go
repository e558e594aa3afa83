//go:build !linux

package front

// express is for Linux: see express_linux.go.
func (f *Front) express(*inbound, newcomer) bool { return false }
