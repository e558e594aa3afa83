// Package plan compiles a configuration: it says what is made of the connections and requests that come in.
// It serves nobody, binds no address and follows nothing; package server runs a plan.
//
//	plan.go     the plan of a configuration, and what it is compiled with
//	needs.go    what a configuration needs of the daemon that runs it
//	service.go  what one listener does, and how its rules are looked up
//	rule.go     a route: match, target, policy
//	several.go  a route with more than one target
//	health.go   how targets are checked
//	http.go     what a route makes of requests
//	labels.go   routes that the labels of containers add
//	guarded.go  what labels may not take of the configured routes
//	peers.go    whom allow and accept_proxy.from name
//	decide.go   who may come in, and by which rule
//	trace.go    what would become of a connection or a request
package plan
