// Package cable gives a test a network of its own, and a cable (a pair of veths) to a second one with small
// windows: what the buffers of loopback hide shows there.
package cable
