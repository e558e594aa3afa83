package config

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
)

// Error is one thing that is wrong with a configuration file, or (in Config.Warnings) looks wrong.
type Error struct {
	File    string
	Pos     Pos
	Message string
}

// Error returns FILE:LINE:COL: MESSAGE, on one line.
func (e *Error) Error() string { return e.File + ":" + e.Pos.String() + ": " + e.Message }

// Errors is everything that is wrong with a configuration file, in the order of the file. It is never
// empty where it is returned as an error.
type Errors []*Error

// Error returns one line for each error, without a newline at the end.
func (e Errors) Error() string { return errors.Join(e.Unwrap()...).Error() }

// Unwrap lets errors.As find the single errors.
func (e Errors) Unwrap() []error {
	all := make([]error, len(e))
	for i, x := range e {
		all[i] = x
	}
	return all
}

// Errorf returns an error about this configuration that points at a place in its file, for problems that
// only show when the configuration is used: an address that cannot be bound, a certificate that does not
// load. Without a valid position it names the file only.
func (c *Config) Errorf(at Pos, format string, args ...any) error {
	msg := fmt.Sprintf(format, args...)
	if at.IsValid() {
		return &Error{File: c.File, Pos: at, Message: msg}
	}
	return fmt.Errorf("%s: %s", cmp.Or(c.File, "configuration"), msg)
}

// reporter collects errors and warnings about one file.
type reporter struct {
	file     string
	errs     Errors
	warnings []*Error
}

// errorf reports an error. It returns false, which callers return for a value that was not understood.
func (r *reporter) errorf(at Pos, format string, args ...any) (ok bool) {
	r.errs = append(r.errs, &Error{File: r.file, Pos: at, Message: oneLine(format, args)})
	return false
}

// errorIf reports an error if something is wrong.
func (r *reporter) errorIf(wrong bool, at Pos, format string, args ...any) {
	if wrong {
		r.errorf(at, format, args...)
	}
}

func (r *reporter) warnf(at Pos, format string, args ...any) {
	r.warnings = append(r.warnings, &Error{File: r.file, Pos: at, Message: oneLine(format, args)})
}

// warnIf reports a warning if something is odd.
func (r *reporter) warnIf(odd bool, at Pos, format string, args ...any) {
	if odd {
		r.warnf(at, format, args...)
	}
}

// oneLine keeps a message on its line, whatever of the file is in it.
func oneLine(format string, args []any) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, fmt.Sprintf(format, args...))
}

// sorted orders errors by place. Those of one place keep their order.
func sorted(errs []*Error) []*Error {
	slices.SortStableFunc(errs, func(a, b *Error) int { return a.Pos.compare(b.Pos) })
	return errs
}
