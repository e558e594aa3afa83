// Package unit tests what people install, under a systemd of its own: the packages on Debian, and the sandbox
// of the unit, in which each datapath, and transparent, must work.
package unit
