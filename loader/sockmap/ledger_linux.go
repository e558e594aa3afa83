package sockmap

import "sync"

// ledger has the flows that prefer the sockmap, and those that were in it and may come back. They are in the
// flows map for as long as they live, also while userspace/relay moves their bytes.
type ledger struct {
	l  *Engine
	mu sync.Mutex
	by map[uint64]*record // by downstream's cookie
}

// record is a flow of the ledger. A nil record is that of a flow which is in the flows map while it is
// spliced, and no longer.
type record struct {
	l      *ledger
	cookie uint64
	count  func() (up, down int64)

	mu sync.Mutex
	// +checklocks:mu
	entry sockmapFlow // in the flows map, while userspace has the flow
	// +checklocks:mu
	isSpliced bool // here; else userspace has the flow
	// +checklocks:mu
	isForgotten bool
}

func (g *ledger) init(l *Engine) { g.l, g.by = l, make(map[uint64]*record) }

// Record puts a flow into the flows map whose bytes userspace moves, and which may be given to Splice, and
// given back, again and again. The caller calls forget when the flow has ended.
func (l *Engine) Record(down, up int, o Flow) (forget func(), err error) {
	defer func() { l.counts.CountRefusal(l.log, err) }()
	if l.counts.IsOff() {
		return nil, RefusedOff
	}
	sockets, cookies := [2]socket{socket(down), socket(up)}, [2]uint64{}
	for i, s := range sockets {
		if s.isMultipath() {
			return nil, refusedMultipath
		}
		if cookies[i], err = s.cookie(); err != nil {
			return nil, refusedSocket
		}
	}
	r, err := l.ledger.add(sockets, cookies, o)
	l.sweeper.atLeast(sweepEvery)
	return r.forgetter(), err
}

func (g *ledger) add(s [2]socket, cookies [2]uint64, o Flow) (*record, error) {
	r := &record{l: g, cookie: cookies[0], count: o.Moved, entry: describe(s, cookies[1], o)}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.l.mu.Lock()
	closed := g.l.closed
	g.l.mu.Unlock()
	switch {
	case closed:
		return nil, RefusedOff
	case len(g.by) >= len(g.l.live):
		return nil, refusedFull
	case g.l.objects.Flows.Put(r.cookie, r.entry) != nil:
		return nil, RefusedMaps
	}
	g.by[r.cookie] = r
	return r, nil
}

func (g *ledger) find(cookie uint64) *record {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.by[cookie]
}

func (g *ledger) all() []*record {
	g.mu.Lock()
	defer g.mu.Unlock()
	all := make([]*record, 0, len(g.by))
	for _, r := range g.by {
		all = append(all, r)
	}
	return all
}

// close forgets all records, when no more are made.
func (g *ledger) close() {
	for _, r := range g.all() {
		r.forget()
	}
}

// publish writes what userspace has moved, and reports whether there are records.
func (g *ledger) publish() (hasRecords bool) {
	all := g.all()
	for _, r := range all {
		r.mu.Lock()
		if !r.isSpliced && !r.isForgotten && r.refresh() {
			_ = g.l.objects.Flows.Put(r.cookie, r.entry)
		}
		r.mu.Unlock()
	}
	return len(all) > 0
}

// refresh brings the entry up to date with what userspace has moved, which has the flow. changed: it has
// moved something.
// +checklocks:r.mu
func (r *record) refresh() (changed bool) {
	up, down := r.count()
	t := &r.entry
	// Userspace, which gets the flow back, may not know yet what was counted here.
	up, down = max(up, int64(t.Up.Bytes)), max(down, int64(t.Down.Bytes))
	if int64(t.Up.Bytes) == up && int64(t.Down.Bytes) == down {
		return false
	}
	t.Up.Bytes, t.Down.Bytes = uint64(up), uint64(down)
	t.Up.Passed = t.Up.Bytes - t.Up.Before - t.Up.Redirected
	t.Down.Passed = t.Down.Bytes - t.Down.Before - t.Down.Redirected
	return true
}

// history gives what has been redirected and copied one way since the flow was recorded, of total bytes.
func (r *record) history(i uint32, total int64) (redirected, copied, trimmed uint64) {
	if r == nil {
		return 0, 0, 0
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	d := &r.entry.Up
	if i == 1 {
		d = &r.entry.Down
	}
	return d.Redirected, uint64(total) - d.Before - d.Redirected, d.Trimmed
}

// enter puts f into the flows map, with the record's history if there is one.
func (r *record) enter(f *flow) error {
	if r == nil {
		t := describe(f.sockets, f.cookies[1], f.o)
		t.Slot = f.slot
		return f.l.objects.Flows.Put(f.cookies[0], t)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.isForgotten {
		return RefusedState
	}
	r.isSpliced = true
	t := r.entry
	t.Slot, t.State = f.slot, sockmapFlowStateFLOW_SPLICED
	f.fill(&t)
	return f.l.objects.Flows.Put(f.cookies[0], t)
}

// leave is called when f is spliced no longer, or was not: the record keeps what was counted. f's mu is held
// for writing, or nobody else knows f.
func (r *record) leave(f *flow) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.isSpliced = false
	f.fill(&r.entry)
	if !r.isForgotten {
		_ = f.l.objects.Flows.Put(r.cookie, r.entry)
	}
}

// forgetter is forget, or nil where there is nothing to forget.
func (r *record) forgetter() func() {
	if r == nil {
		return nil
	}
	return r.forget
}

// forget takes the flow, which has ended, out of the flows map. Called again, it does nothing.
func (r *record) forget() {
	if r == nil {
		return
	}
	r.mu.Lock()
	was := r.isForgotten
	if r.isForgotten = true; !was {
		_ = r.l.l.objects.Flows.Delete(r.cookie)
	}
	r.mu.Unlock()
	if was {
		return
	}
	r.l.mu.Lock()
	delete(r.l.by, r.cookie)
	r.l.mu.Unlock()
}
