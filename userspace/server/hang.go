package server

import (
	"context"
	"errors"
	"fmt"
)

// errLocked is where a reload, a change or a look at the daemon does not end.
var errLocked = errors.New("a change of what is served does not end")

// Serves is an error where the daemon hangs: its loops do not go on, a change does not end before ctx does,
// or nobody has accepted, or tried to without the resources, since the last call what waited at a listener
// then and waits now.
func (srv *Server) Serves(ctx context.Context) error {
	if err := srv.Alive(ctx); err != nil {
		return err
	}
	select {
	case srv.looking <- struct{}{}: // a look that never ends costs one goroutine
	case <-ctx.Done():
		return errLocked
	}
	done := make(chan error, 1)
	go func() {
		srv.mu.Lock()
		defer srv.mu.Unlock()
		done <- srv.lookAtQueues()
		<-srv.looking
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return errLocked
	}
}

// lookAtQueues is an error where a queue does not move.
//
// +checklocks:srv.mu
func (srv *Server) lookAtQueues() (err error) {
	for _, s := range srv.sockets {
		if srv.isHeld || srv.isFrozen {
			s.stood = false
			continue
		}
		taken, waits := s.queue()
		if waits && s.stood && taken == s.took {
			err = fmt.Errorf("connections wait at %s, and none is accepted", s.addr)
		}
		s.took, s.stood = taken, waits
	}
	return err
}
