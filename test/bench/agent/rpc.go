package agent

import (
	"io"
	"net/netip"
	"net/rpc"
	"os"
	"runtime"
)

// Service is an agent as seen by the conductor. [Serve] offers it, [Remote] is its other end.
type Service struct {
	client *Client
	server *Server
}

// Start says what an agent is to be.
type Start struct {
	Listen netip.AddrPort // a server's; invalid for a client
	Hello  []byte
}

// Threads is how many threads an agent has: one for each four CPUs, so that the proxy has the most.
func Threads() int { return max(1, runtime.NumCPU()/4) }

func (s *Service) Start(a Start, _ *struct{}) (err error) {
	if a.Listen.IsValid() {
		s.server, err = NewServer(a.Listen, a.Hello, Threads())
	} else {
		s.client, err = NewClient(a.Hello, Threads())
	}
	return err
}

func (s *Service) Run(j Job, r *Report) error            { *r = s.client.Run(j); return nil }
func (s *Service) Check(_ struct{}, r *Report) error     { *r = s.client.Check(); return nil }
func (s *Service) Resume(_ struct{}, r *Report) error    { *r = s.client.Resume(); return nil }
func (s *Service) Look(_ struct{}, r *Report) error      { *r = s.client.Look(); return nil }
func (s *Service) Report(cell uint32, r *Report) error   { *r = s.server.Report(cell); return nil }
func (s *Service) Stop(cell uint32, _ *struct{}) error   { s.server.Stop(cell); return nil }
func (s *Service) Forget(cell uint32, _ *struct{}) error { s.server.Forget(cell); return nil }

// Serve is the life of an agent: it ends with its standard input.
func Serve() {
	s := rpc.NewServer()
	s.RegisterName("Agent", new(Service))
	s.ServeConn(stdio{os.Stdin, os.Stdout})
}

type stdio struct {
	io.Reader
	io.WriteCloser
}

// Remote talks to an agent in another process.
type Remote struct{ *rpc.Client }

// NewRemote talks over the agent's standard input and output.
func NewRemote(in io.WriteCloser, out io.Reader) Remote {
	return Remote{rpc.NewClient(stdio{out, in})}
}

func ask[A, R any](r Remote, verb string, a A) (out R, err error) {
	err = r.Call("Agent."+verb, a, &out)
	return out, err
}

func (r Remote) Start(a Start) error       { _, err := ask[Start, struct{}](r, "Start", a); return err }
func (r Remote) Run(j Job) (Report, error) { return ask[Job, Report](r, "Run", j) }
func (r Remote) Check() (Report, error)    { return ask[struct{}, Report](r, "Check", struct{}{}) }
func (r Remote) Resume() (Report, error)   { return ask[struct{}, Report](r, "Resume", struct{}{}) }
func (r Remote) Look() (Report, error)     { return ask[struct{}, Report](r, "Look", struct{}{}) }
func (r Remote) Stop(cell uint32) error    { _, err := ask[uint32, struct{}](r, "Stop", cell); return err }
func (r Remote) Forget(cell uint32) error {
	_, err := ask[uint32, struct{}](r, "Forget", cell)
	return err
}
func (r Remote) Report(c uint32) (Report, error) { return ask[uint32, Report](r, "Report", c) }
