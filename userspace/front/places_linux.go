package front

import (
	"context"
	"time"

	"github.com/vishvananda/netlink"
)

// followInterfaces makes the listeners look again whenever an address of this host comes or goes, until ctx
// ends.
func (f *Front) followInterfaces(ctx context.Context) {
	for ctx.Err() == nil {
		changes := make(chan netlink.AddrUpdate)
		err := netlink.AddrSubscribeWithOptions(changes, ctx.Done(), netlink.AddrSubscribeOptions{
			ErrorCallback: func(error) {}}) // the channel is closed then
		if err != nil {
			f.log.Warn("addresses of interfaces are not followed, a reload looks again", "err", err)
			return
		}
		f.lookAtAddresses() // for what changed before
		for range changes {
			f.lookAtAddresses()
		}
		select { // too much at once: begin again
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}
