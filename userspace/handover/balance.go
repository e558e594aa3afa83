package handover

import "github.com/tailsplice/tailsplice/tcpsock"

// A Balance is what of a flow stays as it is while nobody has bytes of it in his hands, whoever moves them:
// what was written to a side less what was read from the other one. See [tcpsock.Position].
type Balance struct {
	Up   int64 `json:"up"`   // written to upstream, less read from downstream
	Down int64 `json:"down"` // written to downstream, less read from upstream

	// From is where the streams were as the flow began to be counted: read from downstream and from upstream.
	UpFrom   int64 `json:"up_from"`
	DownFrom int64 `json:"down_from"`
}

// BalanceOf is that of f, whose bytes nobody moves, and whose counts are right.
func BalanceOf(f *Flow, down, up tcpsock.Position) Balance {
	downRest, upRest := int64(len(f.Down.Rest)), int64(len(f.Up.Rest))
	return Balance{Up: int64(up.Written-down.Read) + downRest, Down: int64(down.Written-up.Read) + upRest,
		UpFrom: int64(down.Read) - downRest - f.BytesUp, DownFrom: int64(up.Read) - upRest - f.BytesDown}
}

// Holds reports whether all bytes that were read from a side were written to the other one, or are the Rest
// of f. Then it sets what f has moved, and how far its streams have come.
func (b *Balance) Holds(f *Flow, down, up tcpsock.Position) bool {
	now := BalanceOf(f, down, up)
	if now.Up != b.Up || now.Down != b.Down {
		return false
	}
	upBytes := int64(down.Read) - int64(len(f.Down.Rest)) - b.UpFrom
	downBytes := int64(up.Read) - int64(len(f.Up.Rest)) - b.DownFrom
	if upBytes < 0 || downBytes < 0 {
		return false
	}
	f.BytesUp, f.BytesDown = upBytes, downBytes
	f.Down.IsShut, f.Up.IsShut = down.IsShut, up.IsShut
	// An end that has come and was not passed on is read again.
	f.Down.IsEnded = down.IsEnded && up.IsShut && len(f.Down.Rest) == 0
	f.Up.IsEnded = up.IsEnded && down.IsShut && len(f.Up.Rest) == 0
	return true
}
