// Package loadertest is what tests of the loader's packages do with any of its datapaths: flows between a
// client and a server, network namespaces and BPF file systems of their own.
package loadertest
