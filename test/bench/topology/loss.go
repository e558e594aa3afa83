package topology

import "github.com/tailsplice/tailsplice/test/loss"

// setLoss loses packets on the client's device, both ways: programs under test that redirect at tc on the
// proxy would go around a filter there. Both ends of the link stop making super-packets, of which one lost
// would be forty lost.
func setLoss(client *namespace, dev string, proxy *namespace, peer string, p float64) error {
	offload := "on"
	if p > 0 {
		offload = "off"
	}
	for _, e := range []struct {
		on  *namespace
		dev string
	}{{client, dev}, {proxy, peer}} {
		if err := run(e.on, "", "ethtool", "-K", e.dev, "tso", offload, "gso", offload); err != nil {
			return err
		}
	}
	return client.do(func() error { return loss.On(dev, p) })
}
