package acme

import (
	"context"
	"log/slog"
	"maps"
	"slices"

	"github.com/mholt/acmez/v3/acme"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// newZap makes a zap logger, which certmagic wants, that writes to log. What certmagic tells of each of its
// steps is for debugging; what this package says better itself is too.
func newZap(log *slog.Logger) *zap.Logger { return zap.New(bridge{log.Handler()}) }

// bridge is a zapcore.Core over a slog.Handler.
type bridge struct{ h slog.Handler }

// saidBetter are messages of certmagic that this package's own make needless.
var saidBetter = []string{"could not get certificate from issuer", "stapling OCSP", "job failed"}

func bridgeLevel(l zapcore.Level) slog.Level {
	if l >= zapcore.WarnLevel {
		return slog.LevelWarn
	}
	return slog.LevelDebug
}

func (b bridge) Enabled(l zapcore.Level) bool {
	return b.h.Enabled(context.Background(), bridgeLevel(l))
}

func (b bridge) With(fields []zapcore.Field) zapcore.Core {
	return bridge{b.h.WithAttrs(attrs(fields))}
}

func (b bridge) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if b.Enabled(e.Level) {
		return ce.AddCore(e, b)
	}
	return ce
}

func (b bridge) Write(e zapcore.Entry, fields []zapcore.Field) error {
	level := bridgeLevel(e.Level)
	if slices.Contains(saidBetter, e.Message) {
		level = slog.LevelDebug
	}
	if !b.h.Enabled(context.Background(), level) {
		return nil
	}
	r := slog.NewRecord(e.Time, level, "certmagic: "+e.Message, 0)
	r.AddAttrs(attrs(fields)...)
	return b.h.Handle(context.Background(), r)
}

func (bridge) Sync() error { return nil }

// attrs turns zap's fields into slog's.
func attrs(fields []zapcore.Field) []slog.Attr {
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range fields {
		f.AddTo(enc)
	}
	var out []slog.Attr
	for _, k := range slices.Sorted(maps.Keys(enc.Fields)) {
		out = append(out, slog.Any(k, enc.Fields[k]))
	}
	return out
}

// protocolLog takes acmez's log: all of it is for debugging, and the problems that authorities report are
// kept for the attempt. When several challenges fail, acmez returns an error that has none of them.
type protocolLog struct {
	h slog.Handler
	a *attempt
}

func (p protocolLog) Enabled(context.Context, slog.Level) bool { return true }

func (p protocolLog) Handle(ctx context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		if problem, ok := a.Value.Any().(acme.Problem); ok && a.Key == "problem" {
			p.a.note(problem)
		}
		return true
	})
	if !p.h.Enabled(ctx, slog.LevelDebug) {
		return nil
	}
	r.Level, r.Message = slog.LevelDebug, "acmez: "+r.Message
	return p.h.Handle(ctx, r)
}

func (p protocolLog) WithAttrs(as []slog.Attr) slog.Handler {
	return protocolLog{p.h.WithAttrs(as), p.a}
}
func (p protocolLog) WithGroup(name string) slog.Handler {
	return protocolLog{p.h.WithGroup(name), p.a}
}
