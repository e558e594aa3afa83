// Package relay is the userspace datapath: it copies the bytes of a flow between two connections,
// and hands the flow to a kernel [Datapath] where there is one that takes it.
//
// It is always there and is the oracle for every other datapath: package relaytest holds the
// table of cases that all of them pass.
package relay
