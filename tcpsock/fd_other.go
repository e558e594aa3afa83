//go:build !linux

package tcpsock

import "time"

// IsClosed is not known here.
func IsClosed(int) bool { return false }

// IsEstablished is not known here.
func IsEstablished(int) bool { return true }

// RoundTrip is not known here.
func RoundTrip(int) time.Duration { return 0 }

// IsUnheard is not known here.
func IsUnheard(int, time.Duration) bool { return false }
