// Package agent generates the load: the client of the benchmark and its server, each a process of its own in
// the namespace of its host, told what to do by the conductor over its standard input and output (net/rpc).
//
// Both are the same event loop: epoll, plain system calls, one buffer, one locked thread (more on machines
// with more than four CPUs), so that what is measured is the proxy and not Go's scheduler. Each flow counts
// what it sent and verifies what it received; package stream says how.
package agent
