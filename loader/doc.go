// Package loader is the kernel side of tailsplice: it loads the BPF programs of ../bpf, and splices pairs of
// TCP sockets so that bytes go from one to the other without passing through this process.
//
// # What it promises
//
// Bytes arrive exactly once, in order and whole, or the flow is reset. A flow holds at most Flow.Buffer bytes
// a direction outside of the sockets' own buffers. An idle flow has no goroutine, a stalled one costs no CPU.
// [New] proves this on loopback before it gives a Loader out, and refuses kernels that are known to lose
// data.
//
// # Packages
//
// Each mechanism has a package. This one puts them together, and is all that the daemon sees.
//
//	host     what this machine's kernel is, has and lacks
//	pins     the maps in the BPF file system, by generation
//	prove    what a datapath has to do, and the proof on loopback that it does
//	sockmap  the verdict: bytes go from socket to socket in the kernel
//	skmsg    past TCP to a process on this host; it is loaded where it is asked for
//
// Data flows one way: each imports only those above it in this list.
//
// # Files
//
//	loader_linux.go   loads and closes all parts; the self-test
//	orphans_linux.go  flows that daemons which were killed have left in the kernel
//	options.go        how to load, and what is said of it
//
// # Least kernel
//
// Linux 6.1 with BTF (CONFIG_DEBUG_INFO_BTF) and CONFIG_BPF_STREAM_PARSER. The process needs CAP_BPF,
// CAP_PERFMON and CAP_NET_ADMIN (or CAP_SYS_ADMIN), and CAP_NET_RAW for the self-test. See [Probe]. Elsewhere
// [New] fails with errors.ErrUnsupported. `make test-kernels` runs the tests on 6.1 and 6.12. On 5.10 flows
// stall at an urgent byte (host/kernel.go).
package loader
