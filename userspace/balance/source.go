package balance

import (
	"math"
	"net/netip"
)

// sourceBits are what tells clients of IPv6 apart: a client may have any address of a /64.
const sourceBits = 64

// Key is an [Option]'s Key by which a client, of a source address, has the same target each time: that with
// the greatest of the scores that both get together (rendezvous hashing, HRW). Each daemon makes the same of
// the same. It is 0 where the address is not valid.
func Key(client netip.Addr, target string) uint64 {
	if !client.IsValid() {
		return 0
	}
	client = client.Unmap().WithZone("")
	bits := client.BitLen()
	if client.Is6() {
		bits = sourceBits
	}
	p, _ := client.Prefix(bits)
	h := uint64(14695981039346656037) // FNV-1a
	add := func(b byte) { h = (h ^ uint64(b)) * 1099511628211 }
	for _, b := range p.Addr().As16() {
		add(b)
	}
	for i := range len(target) {
		add(target[i])
	}
	// FNV's upper bits hardly know the last bytes: splitmix64's finish.
	h = (h ^ h>>30) * 0xbf58476d1ce4e5b9
	h = (h ^ h>>27) * 0x94d049bb133111eb
	return max(h^h>>31, 1)
}

// score is what an option with this key and share gets: the greatest wins, and does so as often as its part
// of all shares says.
func score(key uint64, share int) float64 {
	u := (float64(key>>11) + 0.5) / (1 << 53) // between 0 and 1
	return -float64(share) / math.Log(u)
}
