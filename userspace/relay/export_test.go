package relay

import "time"

// WithParkAfter gives o with another time than two seconds.
func WithParkAfter(o Options, d time.Duration) Options {
	o.parkAfter = d
	return o
}
