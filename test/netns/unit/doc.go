// Package unit tests what `make install` installs, under a systemd of its own: each datapath, and transparent, must work inside the
// sandbox of the shipped unit.
package unit
