package config

import (
	"errors"
	"net"
	"slices"
	"time"
)

// Wake says how a target is woken that does not run. One of Docker and LAN is set at least.
type Wake struct {
	Section
	Docker bool `yaml:"docker" kind:"true"`
	// the address of a network card, as net.ParseMAC reads it
	LAN string `yaml:"lan" kind:"ether"`
	// how long an unused container runs; 0: for ever
	Idle time.Duration `yaml:"idle" default:"30m" min:"0s" max:"8760h"`
}

// wakeIdle is the default of Idle.
const wakeIdle = 30 * time.Minute

// parseLabelWake reads true, or how long a container runs unused that was woken.
func parseLabelWake(s string) (idle time.Duration, err error) {
	if s == "true" {
		return wakeIdle, nil
	}
	d, err := parseDuration(s)
	if err != nil {
		return 0, errors.New("must be true, or how long the container runs unused before it is stopped, such as 30m")
	}
	return time.Duration(d.(int64)), nil
}

// IsDocker reports whether containers are started; w may be nil.
func (w *Wake) IsDocker() bool { return w != nil && w.Docker }

// IsLAN reports whether a machine is woken; w may be nil.
func (w *Wake) IsLAN() bool { return w != nil && w.LAN != "" }

// parseEther reads the address of one network card.
func parseEther(s string) (any, error) {
	mac, err := net.ParseMAC(s)
	switch {
	case err != nil || len(mac) != 6:
		return nil, errors.New("not the address of a network card such as 02:00:5e:10:00:01, which ip link shows on the machine itself")
	case mac[0]&1 != 0:
		return nil, errors.New("it is a multicast address, and no network card's")
	case slices.Max(mac) == 0:
		return nil, errors.New("it is no network card's")
	}
	return mac.String(), nil
}

// wake checks that there is something to wake.
func (v *validator) wake(a *Action, w *Wake) {
	is := func(schemes ...string) func(*Forward) bool {
		return func(f *Forward) bool { return slices.Contains(schemes, f.To.Scheme) }
	}
	v.errorIf(!w.has("docker") && !w.has("lan"), w.Pos, "docker or lan is missing in wake: docker: true starts the container of a docker:// target, lan: MAC wakes a machine")
	v.errorIf(w.Docker && len(a.Forward) > 0 && !slices.ContainsFunc(a.Forward, is("docker")), w.keyAt("docker"), "wake starts containers, and no target is one: forward to docker://CONTAINER:PORT")
	v.errorIf(w.sets("lan") && len(a.Forward) > 0 && !slices.ContainsFunc(a.Forward, is("tcp", "tailnet")), w.keyAt("lan"), "lan wakes another machine, and no target is on one: forward to HOST:PORT or tailnet://NODE:PORT")
	v.errorIf(w.Idle > 0 && w.Idle < time.Second, w.At("idle"), "idle is 1s at least, or 0s: then containers run on")
	v.errorIf(w.has("idle") && !w.has("docker"), w.keyAt("idle"), "idle says when a container is stopped: add docker: true, or remove it")
}
