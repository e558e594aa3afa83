//go:build soak

package oracle

func init() { *executions = 1_000_000 }
