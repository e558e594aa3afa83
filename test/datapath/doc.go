// Package datapath runs the one table of cases (userspace/relay/relaytest) over the kernel datapaths. It is a
// test only: it joins the relay and the loader, which may not import each other.
package datapath
