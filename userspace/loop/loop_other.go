//go:build !linux

// Package loop is a reactor, and there is none on other systems than Linux.
package loop

import "context"

// Reactor is for Linux.
type Reactor struct{}

// Loop is for Linux.
type Loop struct{}

// Socket is for Linux.
type Socket struct{}

// New gives a Reactor without loops.
func New(int) (*Reactor, error) { return new(Reactor), nil }

// Close does nothing.
func (*Reactor) Close() {}

// Len is 0.
func (*Reactor) Len() int { return 0 }

// Alive is nil.
func (*Reactor) Alive(context.Context) error { return nil }
