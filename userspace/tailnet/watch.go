package tailnet

import (
	"context"
	"time"

	"tailscale.com/client/local"
	"tailscale.com/ipn"
	"tailscale.com/tailcfg"
	"tailscale.com/types/netmap"

	"github.com/tailsplice/tailsplice/userspace/follow"
)

const (
	// restFactor is how many times the last Status request's duration passes before the next, so that a
	// netmap of thousands of nodes that never rests costs a tenth of a CPU at most.
	restFactor = 10
	restMax    = 2 * time.Second // bounds the pause of restFactor
)

// watchMask asks for the state at once (which shows that the watch works), for nodes that were added, changed
// or removed, and for one node's online state as a small patch, but for no netmap, engine statistics or
// health. An older tailscaled sends a whole netmap for each change instead, which serves as well.
const watchMask = ipn.NotifyInitialState | ipn.NotifyPeerChanges | ipn.NotifyPeerPatches | ipn.NotifyNoNetMap

// Run follows the netmap until ctx is done, through restarts of tailscaled. It is what makes answers current
// and calls the functions of [Client.OnChange]. Call it once.
func (c *Client) Run(ctx context.Context) {
	follow.Run(ctx, func(ctx context.Context) error {
		defer c.watchEnded()
		return c.watch(ctx)
	}, c.reportLoss)
}

// reportLoss logs that tailscaled went away, once until it comes back.
func (c *Client) reportLoss(err error) {
	c.mu.Lock()
	first := !c.lost
	c.lost = true
	c.mu.Unlock()
	if first {
		c.log.Warn("tailnet unavailable", "err", err)
		c.notifyChange()
	}
}

// watch follows one connection to the notification bus until it fails.
func (c *Client) watch(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// The bus answers at once or hangs; the timer stands down at the first word.
	timer := time.AfterFunc(askTimeout, cancel)
	defer timer.Stop()
	w, err := c.lc.WatchIPNBus(ctx, watchMask)
	if err == nil {
		defer w.Close()
		_, err = w.Next()
	}
	switch {
	case !timer.Stop():
		return socketError(c.socket, context.DeadlineExceeded)
	case err != nil:
		return localError(c.socket, err)
	}

	// From here on every change is heard of, so what is asked now stays good.
	dirty := make(chan struct{}, 1)
	failed := make(chan error, 1)
	go func() { failed <- c.listen(w, dirty) }()
	err = c.follow(ctx, dirty, failed)
	cancel()
	w.Close()
	<-failed // so that the listener of an old watch never speaks for a new one
	return err
}

// listen takes in notifications until the bus fails.
func (c *Client) listen(w *local.IPNBusWatcher, dirty chan<- struct{}) error {
	for {
		n, err := w.Next()
		if err != nil {
			c.watchEnded() // now, though follow may be resting
			return localError(c.socket, err)
		}
		if c.heard(&n) {
			select {
			case dirty <- struct{}{}:
			default: // one is waiting already
			}
		}
	}
}

// follow keeps the table current until the listener fails.
func (c *Client) follow(ctx context.Context, dirty <-chan struct{}, failed chan error) error {
	if _, err := c.ask(ctx); err != nil {
		return err
	}
	c.mu.Lock()
	c.live = true
	returned := c.lost
	c.lost = false
	c.mu.Unlock()
	c.announce(returned)

	beat := time.NewTicker(follow.Pulse)
	defer beat.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-failed:
			failed <- err // for watch
			return err
		case <-beat.C:
			if err := c.alive(ctx); err != nil {
				return err
			}
		case <-dirty:
			if !follow.Sleep(ctx, follow.Settle) {
				return ctx.Err()
			}
			began := time.Now()
			if _, err := c.ask(ctx); err != nil {
				return err
			}
			c.announce(false)
			follow.Sleep(ctx, min(restFactor*time.Since(began), restMax))
		}
	}
}

// announce tells the log and the callbacks what is different from last time.
func (c *Client) announce(anyway bool) {
	c.mu.Lock()
	t, last := c.table, c.announced
	c.announced = t
	c.mu.Unlock()
	if last == nil || anyway || t.state != last.state {
		c.log.Info("tailnet", "state", t.state, "suffix", t.suffix, "nodes", len(t.byID))
	}
	if last == nil || anyway || !t.sameAs(last) {
		c.notifyChange()
	}
}

// alive asks a question that is cheap to answer.
func (c *Client) alive(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	_, err := c.lc.StatusWithoutPeers(ctx)
	return localError(c.socket, err)
}

// watchEnded makes every answer ask again.
func (c *Client) watchEnded() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.live {
		c.good = time.Now()
	}
	c.live, c.noted = false, time.Now()
	c.forgetIdentitiesLocked()
}

// heard takes in one notification, and reports whether the table must be asked for again.
func (c *Client) heard(n *ipn.Notify) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	//lint:ignore SA1019 an older tailscaled sends nothing but the NetMap
	legacy := n.NetMap != nil
	changed := legacy || n.State != nil || n.SelfChange != nil ||
		len(n.PeersChanged) > 0 || len(n.PeersRemoved) > 0 || len(n.UserProfiles) > 0
	for _, p := range n.PeerChangedPatch {
		if !c.presenceLocked(p) {
			changed = true
		}
	}
	if !changed {
		return false
	}
	if n.SelfChange != nil {
		c.suffix = normalName(netmap.MagicDNSSuffixOfNodeName(n.SelfChange.Name))
	}
	c.noted = time.Now()
	c.forgetIdentitiesLocked()
	return true
}

// presenceLocked applies a patch that leaves who a node is, and where; it reports false for any other.
//
// +checklocks:c.mu
func (c *Client) presenceLocked(p *tailcfg.PeerChange) bool {
	if p.Key != nil || p.KeySignature != nil || p.CapMap != nil || p.KeyExpiry != nil {
		return false
	}
	if c.table == nil {
		return true
	}
	n := c.table.byID[p.NodeID]
	if n == nil {
		return false // not known yet: ask
	}
	if p.Online != nil {
		n.online = *p.Online
	}
	if p.LastSeen != nil {
		n.seen = *p.LastSeen
	}
	return true
}
