package server

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"time"

	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/deny"
	"github.com/tailsplice/tailsplice/userspace/vhost"
)

// denials are those whom a listener's deny names. The nil denials are nobody.
type denials struct {
	own   *deny.Table
	files []*deny.File
}

// refuse is an error where deny names a, or a file of it could never be read: then it may name anybody.
func (d *denials) refuse(a netip.Addr) error {
	if d == nil {
		return nil
	}
	if d.own.Contains(a) {
		return &deniedError{addr: a}
	}
	for _, file := range d.files {
		switch {
		case file.IsUnread():
			return &deniedError{a, file.Name()}
		case file.Contains(a):
			return &deniedError{addr: a}
		}
	}
	return nil
}

// problems are those of files for which a listener lets in nobody.
func (d *denials) problems(listener string) (all []Problem) {
	if d == nil {
		return nil
	}
	for _, file := range d.files {
		if err := file.Problem(); err != nil && file.IsUnread() { // it may be read meanwhile
			all = append(all, Problem{PartDeny, listener, file.Name(),
				"everybody is denied until it can be read: " + cause(err).Error()})
		}
	}
	return all
}

// deniedError says that deny names an address.
type deniedError struct {
	addr   netip.Addr
	unread string // the file that may name it; "": it is named
}

func (e *deniedError) Error() string {
	if e.unread != "" {
		return fmt.Sprintf("deny may name %s: %s can't be used", e.addr, e.unread)
	}
	return fmt.Sprintf("deny names %s", e.addr)
}

// screen says why a connection may not come in, before anything of it is charged: addr is denied, or source
// opens connections too fast, or holds much of the memory while that is short. It is asked before a byte is
// read, with the peer's address, and again with that of a PROXY header that is believed. source is the zero
// Addr where it is not known yet whose the connection is. It waits for nothing.
func (srv *Server) screen(s *service, addr, source netip.Addr) error {
	if err := s.deny.refuse(addr); err != nil {
		return err
	}
	if err := srv.memory.Refuse(source); err != nil {
		return err
	}
	return srv.newRate.Take(source, time.Now())
}

// attribute makes the connection count as a's, whose it is, if it may come in: once, though it may be called
// again.
func (in *conn) attribute(a netip.Addr) error {
	if in.isAttributed {
		return nil
	}
	if err := in.server.screen(in.service, a, a); err != nil {
		return err
	}
	if err := in.lease.Move(a); err != nil {
		return err
	}
	in.isAttributed = true
	return nil
}

// deniedRequest is the answer to a request whose client is denied, nil if it is not: one that a trusted hop
// names in the request, or one that has become so since it connected.
func (srv *Server) deniedRequest(l *listener, v *vhost.Visit, client netip.Addr) error {
	err := l.service.Load().deny.refuse(client)
	if err == nil {
		return nil
	}
	srv.requestRefused(l.name, v, denied, err)
	return &vhost.Refusal{Status: http.StatusForbidden, Title: "Access is not allowed",
		Text:   srv.node() + " does not let visitors in from where you are.",
		Header: http.Header{"Connection": {"close"}}, Err: err}
}

// openDenials reads what the listeners of cfg deny, by listener. A file that can't be read is an error, but
// where the daemon starts, and replaces no other, or does without it already. The caller closes the files.
//
// +checklocks:srv.mu
func (srv *Server) openDenials(cfg *config.Config, starts bool) (
	all map[string]*denials, files []*deny.File, err error) {
	all = map[string]*denials{}
	opened := map[string]*deny.File{} // each once
	before, isUnread := map[string]*deny.Table{}, map[string]bool{}
	for _, file := range srv.denyFiles {
		before[file.Name()], isUnread[file.Name()] = file.Table(), file.IsUnread()
	}
	var errs []error
	for _, l := range cfg.Listeners {
		if len(l.Deny) == 0 {
			continue
		}
		d := &denials{}
		var own []netip.Prefix
		for _, item := range l.Deny {
			if item.File == "" {
				p, _ := config.ParsePrefix(item.From) // config has checked it
				own = append(own, p)
				continue
			}
			file := opened[item.File]
			if file == nil {
				if starts && !srv.opts.Replaces || isUnread[item.File] {
					file = deny.Await(item.File, config.ParsePrefix, srv.log)
				} else if file, err = deny.Open(
					item.File, config.ParsePrefix, srv.log, before[item.File]); err != nil {
					errs = append(errs, cfg.Errorf(item.At("file"), "deny: %v", err))
					continue
				}
				opened[item.File] = file
				files = append(files, file)
			}
			d.files = append(d.files, file)
		}
		d.own = deny.NewTable(own...)
		all[l.Name] = d
	}
	if len(errs) > 0 {
		closeFiles(files)
		return nil, nil, errors.Join(errs...)
	}
	return all, files, nil
}

func closeFiles(files []*deny.File) {
	for _, file := range files {
		file.Close()
	}
}
