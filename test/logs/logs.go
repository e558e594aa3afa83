// Package logs keeps what is logged, so that a test can read it. It is for tests only, and imports none of
// ours.
package logs

import (
	"bytes"
	"log/slog"
	"strings"
	"sync"
)

// Log can be written by many while a test reads it. The zero value is ready.
type Log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// String is all that was written so far.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Count says how often what was written so far.
func (l *Log) Count(what string) int { return strings.Count(l.String(), what) }

// Logger writes lines of text into l.
func (l *Log) Logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }
