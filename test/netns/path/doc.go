// Package path tests the whole path over a real tailnet: client, two edges with one anycast address, home
// behind NAT, a roaming laptop and its container. See package lab for the world that all tests here share.
package path
