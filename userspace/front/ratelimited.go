package front

import (
	"log/slog"
	"sync"
	"time"
)

// lineEvery is how often a stranger's doing may write a log line of one
// kind: a flood of bad connections must not become a flood of lines.
const lineEvery = 5 * time.Second

// rateLimited logs what strangers cause, at most one line of a kind in
// lineEvery; the next line says how many were left out. The metrics count
// all of them.
type rateLimited struct {
	log  *slog.Logger
	mu   sync.Mutex
	last map[string]*lines
}

type lines struct {
	at      time.Time
	omitted int
}

func (c *rateLimited) Warn(kind, msg string, args ...any) {
	c.mu.Lock()
	l := c.last[kind]
	if l == nil {
		l = &lines{}
		c.last[kind] = l
	}
	if time.Since(l.at) < lineEvery {
		l.omitted++
		c.mu.Unlock()
		return
	}
	omitted := l.omitted
	*l = lines{at: time.Now()}
	c.mu.Unlock()
	if omitted > 0 {
		args = append(args, "omitted", omitted)
	}
	c.log.Warn(msg, args...)
}
