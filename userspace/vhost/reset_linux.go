package vhost

import (
	"errors"

	"golang.org/x/sys/unix"
)

// cutsOff reports whether the reset that the first write was told of has cut off the other side's stream. If
// that had ended before, it is told EPIPE (tcp_reset in net/ipv4/tcp_input.c).
func cutsOff(err error) bool { return !errors.Is(err, unix.EPIPE) }
