package main

import (
	"context"
	"net/url"
	"os"
)

// openProgram returns the path that this process was started from; "": another program is there already, or
// none.
func openProgram() string {
	path, err := ownPath()
	if err != nil || isReplaced(path) {
		return ""
	}
	return path
}

// isReplaced reports whether a file at path is not the one that this process runs. The kernel lets nobody
// write to that one, so whoever installs another version puts another file in its place.
func isReplaced(path string) bool {
	now, err := os.Stat(path)
	if err != nil {
		return false // there is none to be started
	}
	own, err := os.Stat("/proc/self/exe") // also where its file was removed
	return err == nil && !os.SameFile(now, own)
}

// reloadOrUpgrade is reload, unless another program is where this one was started from: that one takes over.
// It reads the configuration in any case, in which may be what only it knows. With an error nothing has
// changed.
func (d *process) reloadOrUpgrade(ctx context.Context) (notes []string, err error) {
	if d.program == "" || !isReplaced(d.program) {
		return d.reload()
	}
	d.server.ReopenLogs() // as any reload does
	return d.upgrade(ctx, url.Values{"binary": {d.program}})
}
