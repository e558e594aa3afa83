//go:build !linux

package tcpsock

import "errors"

// PositionOf is not known here.
func PositionOf(int) (Position, error) { return Position{}, errors.ErrUnsupported }
