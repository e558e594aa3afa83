//go:build !linux

package handover

import (
	"context"
	"encoding/json"
	"errors"
	"iter"
	"os"
	"time"
)

var errLinux = errors.New("a daemon can hand its sockets over on Linux only")

// Link is for Linux, as is all of this file.
type Link struct{}

// Send fails.
func (*Link) Send(Message) error { return errLinux }

// SendSockets fails.
func (*Link) SendSockets([]Socket, json.RawMessage, int, ...json.RawMessage) error { return errLinux }

// Hear hears nothing.
func (*Link) Hear(func(*Message)) {}

// Close does nothing.
func (*Link) Close() error { return nil }

// Program is what [Start] would start.
type Program struct {
	Path    string
	Args    []string
	Sibling bool
	Stderr  *os.File
	Lines   func(line []byte)
}

// Successor is a process that there is none of.
type Successor struct {
	*Link
	PID int
}

// Start fails.
func Start(Program) (*Successor, error) { return nil, errLinux }

// Gone is nil.
func (*Successor) Gone() <-chan struct{} { return nil }

// State is nil.
func (*Successor) State() *os.ProcessState { return nil }

// Await fails.
func (*Successor) Await(context.Context, string, time.Duration) (*Message, error) {
	return nil, errLinux
}

// Lasts fails.
func (*Successor) Lasts(time.Duration) error { return errLinux }

// End does nothing.
func (*Successor) End() {}

// Kill does nothing.
func (*Successor) Kill() {}

// Spare does nothing.
func (*Successor) Spare() error { return nil }

// Signal fails.
func (*Successor) Signal(os.Signal) error { return errLinux }

// Predecessor is a process that there is none of.
type Predecessor struct{ *Link }

// Inherit returns nil.
func Inherit(func(error)) (*Predecessor, error) { return nil, nil }

// State returns nil.
func (*Predecessor) State() json.RawMessage { return nil }

// More returns nil.
func (*Predecessor) More() []json.RawMessage { return nil }

// Take returns nothing.
func (*Predecessor) Take(func(Socket) bool) []Socket { return nil }

// Flows is 0.
func (*Predecessor) Flows() int { return 0 }

// Output is standard error.
func (*Predecessor) Output() *os.File { return os.Stderr }

// Ready fails.
func (*Predecessor) Ready() error { return errLinux }

// Serve fails.
func (*Predecessor) Serve() error { return errLinux }

// All returns nothing.
func (*Predecessor) All() []Socket { return nil }

// Store keeps nothing.
type Store struct{}

// OpenStore returns one that has nothing.
func OpenStore() (*Store, []error) { return new(Store), nil }

// Len is 0.
func (*Store) Len() int { return 0 }

// Take returns nothing.
func (*Store) Take(func(Socket) bool) []Socket { return nil }

// State is nil.
func (*Store) State() json.RawMessage { return nil }

// Discard does nothing.
func (*Store) Discard() {}

// Note does nothing.
func (*Store) Note([]Socket) {}

// Sockets are none.
func (*Store) Sockets() ([]Socket, error) { return nil, nil }

// Resume does nothing.
func (*Store) Resume() {}

// Keep does nothing.
func (*Store) Keep([]Socket, json.RawMessage) error { return nil }

// Forget does nothing.
func (*Store) Forget(func(Socket) bool) error { return nil }

// Has is false.
func (*Store) Has([]Socket) bool { return false }

// Keeps is false.
func (*Store) Keeps() bool { return false }

// Sync returns at once.
func (*Store) Sync() error { return nil }

// Notify does nothing.
func (*Store) Notify(string) error { return nil }

// KeptFlow is a flow that there is none of.
type KeptFlow struct{ Flow *Flow }

// NewKeptFlow keeps nothing.
func NewKeptFlow(f *Flow, _, _ int) *KeptFlow { return &KeptFlow{f} }

// Close does nothing.
func (*KeptFlow) Close() {}

// Reset does nothing.
func (*KeptFlow) Reset() {}

// Recall is for Linux.
type Recall func(down, up int, b *Balance) (downRest, upRest []byte, err error)

// What follows is for Linux.
var ErrGone, ErrOver, ErrLostBytes, ErrQueueClosed = errLinux, errLinux, errLinux, errLinux

// Take fails.
func (*KeptFlow) Take(Recall) (*Flow, error) { return nil, errLinux }

// Queue keeps nothing.
type Queue struct{}

// OpenQueue returns one that has nothing.
func OpenQueue([]Socket, func() error) *Queue { return new(Queue) }

// Flows are none.
func (*Queue) Flows(context.Context, func(*KeptFlow)) []error { return nil }

// Len is 0.
func (*Queue) Len() (int, bool) { return 0, true }

// Sockets are none.
func (*Queue) Sockets() ([]Socket, error) { return nil, nil }

// Put fails.
func (*Queue) Put(iter.Seq2[*KeptFlow, error]) (int, error) { return 0, errLinux }

// Renew fails.
func (*Queue) Renew(iter.Seq2[*KeptFlow, error], int) (int, error) { return 0, errLinux }

// Close does nothing.
func (*Queue) Close() {}

// Giver is for Linux.
type Giver struct{}

// Give fails.
func (*Link) Give() (*Giver, error) { return nil, errLinux }

// Give gives nothing.
func (*Giver) Give(_ *Flow, gone func(error)) { gone(errLinux) }

// Lost is nil.
func (*Giver) Lost() <-chan struct{} { return nil }

// Answers is true.
func (*Giver) Answers() bool { return true }

// Close does nothing.
func (*Giver) Close() {}

// Elders are none.
type Elders struct {
	OnSignal func(os.Signal)
	OnMain   func(bool)
	OnFlow   Adopt
	OnState  func(json.RawMessage)
}

// Add does nothing.
func (*Elders) Add(*Link) {}

// AddFile closes f.
func (*Elders) AddFile(f *os.File) error { return f.Close() }

// List is empty.
func (*Elders) List() []Remains { return nil }

// Sockets are none.
func (*Elders) Sockets() ([]Socket, error) { return nil, nil }

// Leave does nothing.
func (*Elders) Leave(int) {}

// End does nothing.
func (*Elders) End(time.Duration) {}

// Wait returns at once.
func (*Elders) Wait(context.Context) {}
