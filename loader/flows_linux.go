package loader

// Flows gives the spliced flows, live. It reads the maps: some microseconds a flow.
func (l *Loader) Flows() []Info {
	var list []Info
	for i := range l.live {
		if f := l.live[i].Load(); f != nil {
			if info, ok := f.info(); ok {
				list = append(list, info)
			}
		}
	}
	return list
}

func (f *flow) info() (Info, bool) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.closed {
		return Info{}, false
	}
	var t spliceFlow
	if err := f.l.objects.Flows.Lookup(f.cookies[0], &t); err != nil {
		return Info{}, false
	}
	up, down := f.halves[0].snapshot(), f.halves[1].snapshot()
	i := Info{
		ID: fromText(t.Id[:]), Route: fromText(t.Route[:]), State: t.State.text(),
		Downstream: fromText(t.Downstream[:]), DownstreamLocal: fromText(t.DownstreamLocal[:]),
		UpstreamLocal: fromText(t.UpstreamLocal[:]), Upstream: fromText(t.Upstream[:]),
		DownstreamCookie: f.cookies[0], UpstreamCookie: f.cookies[1],
		Up: f.before[0] + int64(f.halves[0].moved()), Down: f.before[1] + int64(f.halves[1].moved()),
		UpTrimmed: int64(up.trimmed), DownTrimmed: int64(down.trimmed), UpLocal: int64(up.local), DownLocal: int64(down.local),
	}
	i.UpCopied, i.UpWaiting = f.halves[0].copied(up)
	i.DownCopied, i.DownWaiting = f.halves[1].copied(down)
	return i, true
}

// copied is what userspace has copied, and what waits to be.
func (h *half) copied(s snapshot) (copied, waiting int64) {
	n := load64(&h.shared().Consumed)
	return int64(n), max(int64(s.passed-n), 0)
}

func (s spliceFlowState) text() string {
	switch s {
	case spliceFlowStateFLOW_SPLICED:
		return "spliced"
	case spliceFlowStateFLOW_HALF_CLOSED:
		return "half_closed"
	case spliceFlowStateFLOW_ENDING:
		return "ending"
	}
	return "unknown"
}
