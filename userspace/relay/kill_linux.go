package relay

import "github.com/tailsplice/tailsplice/userspace/loop"

// killOn ends f, if it is still on the loop of its socket: pumps see that it is killed.
func (f *flow) killOn(down *loop.Socket) {
	down.Loop().Do(func() (then func()) {
		if f.isIn(onLoop) {
			then = f.toPumps()
		}
		return then
	})
}
