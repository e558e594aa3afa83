//go:build !linux

package front

import "math"

// express is for Linux: see express_linux.go.
func (f *Front) express(*conn, accepted) bool { return false }

func mostWaiting() int64 { return math.MaxInt64 }
