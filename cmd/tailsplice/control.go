package main

import (
	"context"
	"net"
	"net/http"
	"slices"
	"time"

	"golang.org/x/net/netutil"

	"github.com/tailsplice/tailsplice/userspace/admin"
	"github.com/tailsplice/tailsplice/userspace/handover"
)

// lookEvery is how often the daemon looks whether clients find its control socket.
const lookEvery = time.Second

// watchControl serves h at a new control socket wherever the file of the one before was removed or replaced,
// until ctx ends.
func (d *process) watchControl(ctx context.Context, h http.Handler) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	said := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		ln, err := d.rebindControl()
		switch {
		case err != nil && err.Error() != said:
			said = err.Error()
			d.log.Error("the control socket was removed or replaced, and can't be bound again", "err", err)
		case ln != nil:
			said = ""
			d.log.Warn("the control socket was removed or replaced: it is bound again",
				"path", d.cfg.Control.Socket)
			d.control.serving.Go(func() { admin.Serve(ctx, ln, h, d.log) })
			d.keeper.wake()
		}
	}
}

// rebindControl returns a new control socket, if clients don't find the one before. What that one was asked
// is still answered. While another process takes over, it is that one's to do so.
func (d *process) rebindControl() (net.Listener, error) {
	if !d.changes.TryLock() {
		return nil, nil
	}
	defer d.changes.Unlock()
	d.keeper.mu.Lock()
	defer d.keeper.mu.Unlock()
	if d.next != nil || d.isEnding.Load() {
		return nil, nil
	}
	return d.control.rebind()
}

// rebind binds the control socket again, if there is one that clients don't find.
func (c *controls) rebind() (net.Listener, error) {
	i := slices.IndexFunc(c.bound, func(b boundControl) bool { return b.kind == handover.KindControl })
	if i < 0 {
		return nil, nil
	}
	before, ok := c.bound[i].Listener.(interface {
		leaver
		IsInPlace() bool
	})
	if !ok || before.IsInPlace() {
		return nil, nil
	}
	ln, err := admin.Listen(c.bound[i].address)
	if err != nil {
		return nil, err
	}
	before.Leave()
	c.bound[i].Listener, c.bound[i].isHanded = ln, false
	return netutil.LimitListener(ln, controlConnections), nil
}
