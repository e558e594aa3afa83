// Package metrics holds the daemon's counters, in Prometheus' form.
//
// Every event that the log mentions per flow is counted here, with labels of bounded cardinality only: names
// of listeners and routes, what the configuration names, and fixed reasons; never what strangers choose, such
// as addresses and server names. Each help says what bounds its series.
package metrics

import (
	"net/http"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
)

// Set is one daemon's metrics. Make it with New; all fields are safe for concurrent use.
type Set struct {
	Accepted       *prometheus.CounterVec // listener
	Refused        *prometheus.CounterVec // listener, reason
	Ended          *prometheus.CounterVec // listener, datapath, end
	Cut            *prometheus.CounterVec // reason
	DialError      *prometheus.CounterVec // listener, reason
	Demoted        *prometheus.CounterVec // datapath, reason
	NotTransparent *prometheus.CounterVec // listener, reason
	Reloads        *prometheus.CounterVec // result: ok | error
	LogLost        prometheus.Counter     // lines
	DialTime       prometheus.Histogram   // seconds

	RouteFlows       *prometheus.HistogramVec // seconds; listener, route
	RouteRequests    *prometheus.CounterVec   // listener, route, code
	RouteRequestTime *prometheus.HistogramVec // seconds; listener, route

	registry *prometheus.Registry
}

// New makes a set of its own, so that two daemons in one process (tests) do
// not share counters. now is asked at each scrape.
func New(version string, now func() State) *Set {
	histogram := func(name, help string, buckets ...float64) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "tailsplice_" + name, Help: help, Buckets: buckets},
			[]string{"listener", "route"})
	}
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "tailsplice_" + name, Help: help}, labels)
	}
	s := &Set{
		Accepted: counter("connections_accepted_total", "Connections accepted, before any check.", "listener"),
		Refused: counter("connections_refused_total", "Connections closed before they became a flow, and "+
			"requests refused, by reason.", "listener", "reason"),
		Ended: counter("flows_ended_total", "Flows that have ended, by datapath and by how they ended.",
			"listener", "datapath", "end"),
		Cut: counter("flows_cut_total", "Flows that the daemon has ended before their time, by reason: to free what they "+
			"held, or because an operator said so.", "reason"),
		DialError: counter("dial_errors_total", "Upstreams that could not be reached, by reason.", "listener", "reason"),
		Demoted: counter("flows_demoted_total", "How often a kernel datapath refused a flow or gave one back, "+
			"so that another datapath carries it, by reason.", "datapath", "reason"),
		NotTransparent: counter("not_transparent_total", "Connections to targets of `transparent` routes that could not "+
			"carry the client's address, by reason.", "listener", "reason"),
		LogLost: prometheus.NewCounter(prometheus.CounterOpts{Name: "tailsplice_access_log_lost_total",
			Help: "Lines of access logs that were not written, because the disk was full or too slow."}),
		Reloads: counter("config_reloads_total", "Configuration reloads, by result.", "result"),
		DialTime: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "tailsplice_dial_seconds",
			Help: "Time to resolve and connect to an upstream.", Buckets: prometheus.ExponentialBuckets(0.0005, 2, 15)}),
		RouteFlows: histogram("route_flow_seconds", "Duration of flows that have ended, by route. HTTP requests are in "+
			"tailsplice_route_request_seconds."+routesBound,
			0.1, 1, 10, 60, 600, 3600, 6*3600, 24*3600),
		RouteRequests: counter("route_requests_total", "HTTP requests that have ended, by route and status code. Codes that "+
			"no RFC defines are counted as other; 499 means that the client left. A request that matches no route has "+
			"route=\"none\"."+routesBound,
			"listener", "route", "code"),
		RouteRequestTime: histogram("route_request_seconds", "Duration of HTTP requests that have ended, by route, from their "+
			"header to the end of the response."+routesBound,
			0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60),
		registry: prometheus.NewRegistry(),
	}
	for _, result := range []string{"ok", "error"} {
		s.Reloads.WithLabelValues(result) // else the first one that fails is no increase
	}
	info := prometheus.NewGauge(prometheus.GaugeOpts{Name: "tailsplice_build_info", Help: "Always 1.",
		ConstLabels: prometheus.Labels{"version": version}})
	info.Set(1)
	s.registry.MustRegister(s.Accepted, s.Refused, s.Ended, s.Cut, s.DialError, s.Demoted, s.NotTransparent,
		s.Reloads, s.LogLost, s.DialTime, info, s.RouteFlows, s.RouteRequests, s.RouteRequestTime, collector(now),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return s
}

// WatchLog adds the number of lines that the daemon's own log has lost, which is asked for at each scrape.
func (s *Set) WatchLog(lost func() int64) {
	s.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "tailsplice_log_lost_total",
		Help: "Lines of the daemon's log that were not written, because who reads it did not keep up."},
		func() float64 { return float64(lost()) }))
}

// Handler serves the set in the Prometheus text format.
func (s *Set) Handler() http.Handler {
	return promhttp.HandlerFor(s.registry, promhttp.HandlerOpts{
		ErrorHandling: promhttp.ContinueOnError}) // one metric that is wrong hides no other
}

// DropRoute forgets a route that is not there any more.
func (s *Set) DropRoute(listener, route string) {
	of := prometheus.Labels{"listener": listener, "route": route}
	s.RouteFlows.DeletePartialMatch(of)
	s.RouteRequests.DeletePartialMatch(of)
	s.RouteRequestTime.DeletePartialMatch(of)
}

// Code is the label of a status code.
func Code(status int) string {
	if status != 499 && http.StatusText(status) == "" {
		return "other"
	}
	return strconv.Itoa(status)
}

// Totals adds a counter up by the values of one of its labels, for `tailsplice status`.
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
