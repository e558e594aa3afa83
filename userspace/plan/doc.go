// Package plan says what a configuration makes of the connections and requests
// that come in. It serves nobody: it binds no address and follows nothing.
//
//	needs.go  what a configuration needs of the daemon that runs it
//	peers.go  whom allow and accept_proxy.from name
package plan
