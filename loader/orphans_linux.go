package loader

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/tailsplice/tailsplice/loader/pins"
	"github.com/tailsplice/tailsplice/loader/sockmap"
)

// Orphans are the sockmaps of daemons that were killed, with flows still in them: where another process has a
// flow's sockets as well, the kernel goes on with it. Safe for concurrent use.
type Orphans struct {
	all    []*sockmap.Orphan
	unseen error // why there may be others; nil: there are none
}

// OpenOrphans opens what daemons that are dead have pinned, before [New] removes the pins. There may be none:
// then it is nil, on which all methods work. Where something can't be opened, that is logged, and each flow
// that is not found elsewhere may be in there. bpffs is as in [Options]. The caller closes it.
func OpenOrphans(bpffs string, log *slog.Logger) *Orphans {
	o := &Orphans{}
	o.unseen = pins.VisitDead(bpffs, func(dir string) error {
		one, err := sockmap.OpenOrphan(dir)
		if err != nil {
			return fmt.Errorf("%s: %w", dir, err)
		}
		o.all = append(o.all, one)
		return nil
	})
	if o.unseen != nil {
		log.Warn("flows of a daemon that was killed can't be taken out of its sockmaps", "error", o.unseen)
	} else if len(o.all) == 0 {
		return nil
	}
	return o
}

// Recall takes both sockets of a flow out of the sockmap that they are in, if any, and waits for none of its
// ends. offsets are how many bytes upstream had written more than downstream had read, and downstream than
// upstream, when none were on their way in between (see [tcpsock.Position]). They say whether all is there:
// with an error it is not, or that can't be known, and the flow has to be reset.
//
// What was read of downstream is downRest, up to 64 KiB, to be written to upstream before what is read next;
// upRest is that of the other way.
func (o *Orphans) Recall(ctx context.Context, down, up int, offsets [2]uint64) (downRest, upRest []byte, err error) {
	if o == nil {
		return nil, nil, nil
	}
	for _, one := range o.all {
		rest, found, err := one.Recall(ctx, down, up, offsets)
		if found || err != nil {
			return rest[0], rest[1], err
		}
	}
	return nil, nil, o.unseen
}

// Close is called when all recalls have returned.
func (o *Orphans) Close() (err error) {
	if o == nil {
		return nil
	}
	for _, one := range o.all {
		err = errors.Join(err, one.Close())
	}
	o.all = nil
	return err
}
