// Package wire is the far end of a cable, for tests: it speaks TCP by hand, through a TUN device, and so can
// send what no kernel does when asked to, but networks bring about: segments that overlap, come twice, out of
// order, with one byte, into a closed window.
//
// [Cases] are the ways to send that every datapath has to turn into the same stream. It imports none of ours,
// so that the loader's tests can use it as well as the table of cases.
//
// Its files:
//
//	wire_linux.go   the cable: a TUN device in a namespace
//	conn_linux.go   a connection by hand
//	cases_linux.go  segments that no kernel would send
package wire
