// Package conduct runs the benchmark: it makes the topologies, starts the systems, has the agents generate
// load in alternating rounds, and collects what was measured.
//
// # Fairness
//
// All systems are up all the time, each on a port of its own; one at a time gets load. Rounds alternate, A B
// C A B C, so that what the machine does meanwhile meets all alike, and ratios are taken within a round.
// "direct" is measured at both ends of each round, and how much the two differ is the noise floor: no smaller
// difference is called one. Memory is measured on a freshly started process each time.
//
// # Processor time
//
// cpu_per_gib is all that the machine was busy, client and server included, by /proc/stat. proxy_cpu_per_gib
// is what the kernel charges to the proxy's processes by /proc/PID/stat, which includes softirqs that ran
// while they did. kernel_cpu_per_gib is kernel threads (ksoftirqd). Softirqs that interrupted somebody else
// are in none of these; so added_cpu_per_gib is the honest total: what the machine took beyond what plain
// forwarding took in the same round for the same bytes.
package conduct
