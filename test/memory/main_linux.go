// Command memory tries an edge of 256 MB: the daemon in a virtual machine of that size, its target and its
// clients outside, most of whom mean it harm. It says whether the daemon has stayed alive and within its
// budget, and what a good client noticed. scripts/test-memory builds it and finds the kernel;
// docs/configuration.md#memory says what the daemon promises.
//
//	run       makes namespaces that end with it, and conducts in them; starts the parts below as processes
//	guest     the machine's first process: starts the daemon, and tells once a second what takes memory
//	targets   what routes lead to
//	source    an address that opens what it may
//
// It needs no KVM, but an emulated processor is ten times as slow, or more. So the daemon is tried on this
// machine's processor first, for scale: how many flows a second it begins here, over how many it begins in
// the machine, is the factor by which more time is allowed. Of the halves of hellos half as many are sent as
// the machine takes, while a good client is judged, and all that are wanted in a phase for itself.
//
// Its files:
//
//	main_linux.go     which of these parts this process is
//	conduct_linux.go  the network, and the phases of load
//	judge_linux.go    what must hold
//	machine_linux.go  the machine, from outside
//	guest_linux.go    the machine, from inside
//	targets_linux.go  the targets
//	source_linux.go   what a source opens
//	client_linux.go   what a good client notices
package main

import (
	"fmt"
	"os"
)

func main() {
	if os.Getpid() == 1 && len(os.Args) < 2 {
		guest()
	}
	role := ""
	if len(os.Args) > 1 {
		role = os.Args[1]
	}
	var err error
	switch role {
	case "run":
		err = run(os.Args[2:])
	case "conduct":
		err = conduct(os.Args[2:])
	case "targets":
		err = targets(os.Args[2:])
	case "source":
		err = source(os.Args[2:])
	default:
		err = fmt.Errorf("no part is called %q: run, conduct, targets, source", role)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "test-memory:", err)
		os.Exit(1)
	}
}
