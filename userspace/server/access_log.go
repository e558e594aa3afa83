package server

import (
	"fmt"
	"os"
	"sync"

	"github.com/tailsplice/tailsplice/userspace/accesslog"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

// openLogs opens those access logs, and keeps those that are open already; if the daemon starts, one that
// can't be opened is waited for. fresh are those that are newly open, with an error too.
//
// +checklocks:srv.mu
func (srv *Server) openLogs(file string, all []*config.AccessLog, starts bool) (logs map[string]*accesslog.Log, fresh []*accesslog.Log, err error) {
	logs = map[string]*accesslog.Log{}
	for _, a := range all {
		l := srv.logs[logKey(a)]
		if l == nil {
			l, err = accesslog.Open(accesslog.Options{File: a.File, Format: a.Format, Log: srv.log, Wait: starts,
				Lost: func(n int) { srv.metrics.LogLost.Add(float64(n)) }})
			if err != nil {
				return nil, fresh, fmt.Errorf("%s:%s: access_log: %w: name a file in a folder that is there and that user %d may write to", file, a.At("file"), err, os.Getuid())
			}
			fresh = append(fresh, l)
		}
		logs[logKey(a)] = l
	}
	return logs, fresh, nil
}

// useLogs makes logs those that are open. The others are closed at the same time: each may wait for a disk or
// a pipe that takes nothing.
//
// +checklocks:srv.mu
func (srv *Server) useLogs(logs map[string]*accesslog.Log) {
	var closing sync.WaitGroup
	for key, l := range srv.logs {
		if logs[key] == nil {
			closing.Go(l.Close)
		}
	}
	closing.Wait()
	srv.logs = logs
}

// ReopenLogs opens the files of access logs anew, as after a rotation.
func (srv *Server) ReopenLogs() {
	srv.mu.Lock()
	defer srv.mu.Unlock()
	for _, l := range srv.logs {
		l.Reopen()
	}
}

func logKey(a *config.AccessLog) string { return a.Format + " " + a.File }

// logAccess writes a request's line into the access log, if there is one, and says whether that line tells
// all. The formats of Apache have neither the id, which error pages name, nor what went wrong.
func (srv *Server) logAccess(l *listener, r *vhost.Request) bool {
	log := l.service.Load().accessLog
	if log == nil {
		return false
	}
	e := &accesslog.Entry{Time: r.Started, ID: r.ID, RequestID: r.RequestID, Node: srv.node(), Listener: l.name, Client: r.Client.Addr(), User: r.User,
		Method: r.Method, Host: r.Host, URI: r.URI, Proto: r.Proto, Status: r.Status, BytesUp: r.BytesIn, BytesDown: r.BytesOut,
		Duration: r.Duration, Referer: r.Header.Get("Referer"), UserAgent: r.Header.Get("User-Agent")}
	if r.Upstream != nil {
		e.Route, e.Target = r.Route.Name, targetOf(r.Upstream)
	}
	if r.UpstreamConn != nil {
		e.Upstream = remoteString(r.UpstreamConn)
	}
	if r.Err != nil {
		e.Err = r.Err.Error()
	}
	log.Write(e)
	return r.Err == nil || log.TellsErrors()
}
