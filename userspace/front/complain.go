package front

import (
	"log/slog"
	"sync"
	"time"
)

// complainEvery is how often a stranger's doing may write a log line of one
// kind: a flood of bad connections must not become a flood of lines.
const complainEvery = 5 * time.Second

// complaints logs what strangers cause, at most one line of a kind in
// complainEvery; the next line says how many were left out. The metrics count
// all of them.
type complaints struct {
	log  *slog.Logger
	mu   sync.Mutex
	last map[string]*complaint
}

type complaint struct {
	at      time.Time
	omitted int
}

func (c *complaints) Warn(kind, msg string, args ...any) {
	c.mu.Lock()
	l := c.last[kind]
	if l == nil {
		l = &complaint{}
		c.last[kind] = l
	}
	if time.Since(l.at) < complainEvery {
		l.omitted++
		c.mu.Unlock()
		return
	}
	omitted := l.omitted
	*l = complaint{at: time.Now()}
	c.mu.Unlock()
	if omitted > 0 {
		args = append(args, "omitted", omitted)
	}
	c.log.Warn(msg, args...)
}
