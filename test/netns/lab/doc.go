// Package lab brings up the whole world of tailsplice on one machine, from real parts in network namespaces:
// an internet router with BIRD, a client, two edges that share an anycast address, a home behind NAT, a
// laptop with two uplinks and a dockerd, a cloud service, and a real tailscaled on every node of a private
// tailnet.
//
//	                      ┌── edge-a ──┐ 192.0.2.80, 2001:db8:80::80
//	client ─── inet ──────┼── edge-b ──┘ (BGP + BFD, anycast)
//	           │  │  │    ├── nat ─── home            192.168.50.2
//	   control │  │  │    ├── laptop (wifi | hotspot) ── dockerd ── blog
//	      DERP ┘  │  └────┴── cloud
//	         STUN ┘            friend (an untagged node, if asked for)
//
// Tests and the demo share it:
//
//	w := lab.Start(t, lab.Options{})            // ends with the test
//	d := w.EdgeA.Tailsplice(t, lab.EdgeConfig)  // the daemon under test
//	conn, err := w.Client.Dial(ctx, "tcp", "example.vsq.cz:443")
//	w.Laptop.Roam("hotspot")
//
// # How a host is made
//
// A [Host] is one OS thread of this process in a network, mount and UTS namespace of its own, with a private
// /etc (overlay), a private /run and its own host name. Everything that runs on the host is started by that
// thread, so that it inherits the namespaces, and PDEATHSIG ends it with this process however that dies. In
// consequence default paths are right on every host: /run/tailscale/tailscaled.sock is that host's
// tailscaled, /run/docker.sock is only there on the laptop, and /run/tailsplice/control.sock is that host's
// daemon.
//
// # What is left behind
//
// Nothing: on success, failure, SIGINT, panic and SIGKILL a small shell that waits for the end of this
// process removes the namespaces' names, the cgroups and the files. Should it be killed too, the next [New]
// sweeps what a dead owner left. Everything that has a name in the root namespace carries the prefix "tsl-"
// and the run's id.
//
// It needs root, Linux 5.10 or newer, and the Debian packages that scripts/provision installs; see [Require].
package lab
