package main

import (
	"errors"
	"log/slog"
	"testing"

	"github.com/tailsplice/tailsplice/loader"
	"github.com/tailsplice/tailsplice/userspace/server"
)

// TestFirstLoad: who waits for the first attempt to load is told when it is over, and what came of it is known.
func TestFirstLoad(t *testing.T) {
	for _, err := range []error{nil, errors.New("no")} {
		begun, goOn := make(chan bool), make(chan bool)
		var isHeard bool
		p := &datapaths{log: slog.New(slog.DiscardHandler), quit: make(chan struct{}), tried: make(chan struct{})}
		p.load = func() (*loader.Loader, error) {
			close(begun)
			<-goOn
			return nil, err
		}
		p.lacks = func(*server.Server, string) { isHeard = err != nil }
		p.loaded = func(*server.Server, *loader.Loader) { isHeard = err == nil }
		p.offer(nil)
		<-begun
		select {
		case <-p.tried:
			t.Error("it is said to be over, and is not")
		default:
		}
		close(goOn)
		<-p.tried
		if !isHeard {
			t.Errorf("%v was not heard", err)
		}
		p.close()
	}
}
