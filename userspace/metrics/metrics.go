// Package metrics holds the daemon's counters, in Prometheus' form.
//
// Every event that the log mentions per flow is counted here, with labels of
// bounded cardinality only: names of listeners and fixed reasons, never
// addresses or server names, which strangers choose.
package metrics

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
)

// Set is one daemon's metrics. Make it with New; all fields are safe for
// concurrent use.
type Set struct {
	Accepted       *prometheus.CounterVec // listener
	Refused        *prometheus.CounterVec // listener, reason
	Ended          *prometheus.CounterVec // listener, datapath, end
	Cut            *prometheus.CounterVec // reason
	Bytes          *prometheus.CounterVec // listener, direction: up | down
	DialError      *prometheus.CounterVec // listener, reason
	Demoted        *prometheus.CounterVec // datapath, reason
	NotTransparent *prometheus.CounterVec // listener, reason
	Reloads        *prometheus.CounterVec // result: ok | error
	LogLost        prometheus.Counter     // lines
	DialTime       prometheus.Histogram   // seconds

	registry *prometheus.Registry
}

// New makes a set of its own, so that two daemons in one process (tests) do
// not share counters. flows is asked for the number of live flows.
func New(version string, flows func() int) *Set {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "tailsplice_" + name, Help: help}, labels)
	}
	s := &Set{
		Accepted:       counter("connections_accepted_total", "Connections accepted, before any check.", "listener"),
		Refused:        counter("connections_refused_total", "Connections closed before they became a flow, and requests refused, by reason.", "listener", "reason"),
		Ended:          counter("flows_ended_total", "Flows that ended, by datapath and by how they ended.", "listener", "datapath", "end"),
		Cut:            counter("flows_cut_total", "Flows that the daemon has ended for want of what they held, by reason.", "reason"),
		Bytes:          counter("bytes_total", "Bytes of ended flows; up is from downstream to upstream.", "listener", "direction"),
		DialError:      counter("dial_errors_total", "Upstreams that could not be reached, by reason.", "listener", "reason"),
		Demoted:        counter("flows_demoted_total", "Flows that a datapath gave back to userspace, by reason.", "datapath", "reason"),
		NotTransparent: counter("not_transparent_total", "Connections to targets of `transparent` routes that could not carry the client's address, by reason.", "listener", "reason"),
		LogLost: prometheus.NewCounter(prometheus.CounterOpts{Name: "tailsplice_access_log_lost_total",
			Help: "Lines of access logs that were not written, because the disk was full or too slow."}),
		Reloads: counter("config_reloads_total", "Configuration reloads, by result.", "result"),
		DialTime: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "tailsplice_dial_seconds",
			Help: "Time to resolve and connect to an upstream.", Buckets: prometheus.ExponentialBuckets(0.0005, 2, 15)}),
		registry: prometheus.NewRegistry(),
	}
	info := prometheus.NewGauge(prometheus.GaugeOpts{Name: "tailsplice_build_info", Help: "Always 1.",
		ConstLabels: prometheus.Labels{"version": version}})
	info.Set(1)
	live := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "tailsplice_flows", Help: "Flows that live now."},
		func() float64 { return float64(flows()) })
	s.registry.MustRegister(s.Accepted, s.Refused, s.Ended, s.Cut, s.Bytes, s.DialError, s.Demoted, s.NotTransparent, s.Reloads, s.LogLost, s.DialTime, info, live,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return s
}

// Watch adds the health of a datapath, which is asked for it at each scrape.
func (s *Set) Watch(datapath string, health func() (off string, stalls uint64)) {
	labels := prometheus.Labels{"datapath": datapath}
	s.registry.MustRegister(
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "tailsplice_datapath_stalls_total", ConstLabels: labels,
			Help: "Times that a flow of this datapath had come to rest with bytes to move, and went on up to 3 s late because the daemon looked. Should be 0: each is a defect, of the daemon or of the kernel, and is worth a report."},
			func() float64 { _, n := health(); return float64(n) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "tailsplice_datapath_on", ConstLabels: labels,
			Help: "1 while the datapath takes flows; 0 once a burst of failures has switched it off, until the daemon is started again. Flows go through userspace then."},
			func() float64 {
				if off, _ := health(); off != "" {
					return 0
				}
				return 1
			}))
}

// WatchRequests adds the number of requests under way, which is asked for at
// each scrape.
func (s *Set) WatchRequests(underWay func() int) {
	s.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "tailsplice_requests", Help: "HTTP requests under way now."},
		func() float64 { return float64(underWay()) }))
}

// WatchProblems adds the number of problems of a part of the configuration, which is
// asked for at each scrape.
func (s *Set) WatchProblems(part string, now func() int) {
	s.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "tailsplice_problems", ConstLabels: prometheus.Labels{"part": part},
		Help: "What of the configuration does not work now, by part: `tailsplice status` and /readyz say what is wrong. With address, certificate and default the daemon is not ready."},
		func() float64 { return float64(now()) }))
}

// WatchLog adds the number of lines that the daemon's own log has lost, which is
// asked for at each scrape.
func (s *Set) WatchLog(lost func() int64) {
	s.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "tailsplice_log_lost_total",
		Help: "Lines of the daemon's log that were not written, because who reads it did not keep up."},
		func() float64 { return float64(lost()) }))
}

// Handler serves the set in the Prometheus text format.
func (s *Set) Handler() http.Handler {
	return promhttp.HandlerFor(s.registry, promhttp.HandlerOpts{})
}

// Totals adds a counter up by the values of one of its labels, for
// `tailsplice status`.
func Totals(c *prometheus.CounterVec, label string) map[string]int64 {
	ch := make(chan prometheus.Metric)
	go func() { c.Collect(ch); close(ch) }()
	sums := map[string]int64{}
	for m := range ch {
		var d dto.Metric
		if m.Write(&d) != nil {
			continue
		}
		for _, l := range d.GetLabel() {
			if l.GetName() == label {
				sums[l.GetValue()] += int64(d.GetCounter().GetValue())
			}
		}
	}
	return sums
}
