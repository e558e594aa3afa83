package sockmap

// Flows gives the spliced flows, live. It reads the maps: some microseconds a flow.
func (l *Engine) Flows() []Info {
	var list []Info
	for i := range l.live {
		if f := l.live[i].Load(); f != nil && f.record == nil { // else its record knows who has it
			if info, ok := f.info(); ok {
				list = append(list, info)
			}
		}
	}
	for _, r := range l.ledger.all() {
		if info, ok := r.info(); ok {
			list = append(list, info)
		}
	}
	return list
}

// describeInfo is what an entry of the flows map says about who has the flow.
func describeInfo(t *sockmapFlow) Info {
	return Info{
		ID: fromText(t.Id[:]), Route: fromText(t.Route[:]), State: t.State.text(),
		Downstream: fromText(t.Downstream[:]), DownstreamLocal: fromText(t.DownstreamLocal[:]),
		UpstreamLocal: fromText(t.UpstreamLocal[:]), Upstream: fromText(t.Upstream[:]),
		UpstreamCookie: t.UpstreamCookie,
		UpTrimmed:      int64(t.Up.Trimmed), DownTrimmed: int64(t.Down.Trimmed),
	}
}

func (f *flow) info() (Info, bool) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.isClosed {
		return Info{}, false
	}
	var t sockmapFlow
	if err := f.l.objects.Flows.Lookup(f.cookies[0], &t); err != nil {
		return Info{}, false
	}
	up, down := f.directions[0].snapshot(), f.directions[1].snapshot()
	i := describeInfo(&t)
	i.DownstreamCookie = f.cookies[0]
	i.Up, i.Down = f.before[0]+int64(f.directions[0].moved()), f.before[1]+int64(f.directions[1].moved())
	i.UpTrimmed, i.DownTrimmed = int64(up.trimmed), int64(down.trimmed)
	i.UpLocal, i.DownLocal = int64(up.local), int64(down.local)
	i.UpCopied, i.UpWaiting = f.directions[0].copied(up)
	i.DownCopied, i.DownWaiting = f.directions[1].copied(down)
	return i, true
}

// copied is what userspace has copied, and what waits to be.
func (d *direction) copied(s snapshot) (copied, waiting int64) {
	n := load64(&d.shared().Consumed)
	return int64(n), max(int64(s.passed-n), 0)
}

func (s sockmapFlowState) text() string {
	switch s {
	case sockmapFlowStateFLOW_SPLICED:
		return "spliced"
	case sockmapFlowStateFLOW_HALF_CLOSED:
		return "half_closed"
	case sockmapFlowStateFLOW_ENDING:
		return "ending"
	}
	return "unknown"
}
