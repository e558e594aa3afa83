// Package loss makes a network device lose packets, on kernels without netem.
package loss
