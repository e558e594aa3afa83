// Package clients tests the terminating hop with what others have written to find out whether a server keeps
// to its protocol: h2spec, gRPC's interoperability tests, and WebSocket clients that build their frames
// themselves.
package clients
