//go:build !linux

package front

import "math"

// takeFastPath is for Linux: see fastpath_linux.go.
func (f *Front) takeFastPath(*conn, accepted) bool { return false }

func mostWaiting() int64 { return math.MaxInt64 }
