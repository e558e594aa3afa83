package tcpsock

// Position is where the two streams of a connection are, as TCP counts them, whoever reads and writes.
//
// What one socket has written less what another one has read stays the same while nothing of the stream from
// that to this one is in anybody's hands: a process's, a pipe's, or in the queue of a sockmap.
type Position struct {
	Read    uint64 // bytes that have left the receive queue
	Written uint64 // bytes that TCP was given, and one more in one that was dialled, for its SYN
	IsEnded bool   // the other end has ended its stream: a FIN has come
	IsShut  bool   // we have ended ours
}
