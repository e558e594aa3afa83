// Package acme tests that certificates come by themselves in the world of the lab: from a real ACME server
// out on the internet, through either edge's passthrough, and that they outlive what can go wrong.
package acme
