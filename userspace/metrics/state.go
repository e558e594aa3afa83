package metrics

import (
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// State is what a scrape shows as it is now, and what others count.
type State struct {
	Flows        int // live
	Requests     int // of HTTP, under way
	Held         int // connections and requests that wait for a target
	Traffic      []Traffic
	Listeners    []Listener
	Datapaths    []Datapath
	Targets      []Target
	Disabled     []string // targets
	Certificates []Certificate
	ACME         []ACME
	Problems     map[string]int // by part, also those that have none
	Memory       []Memory
}

// Memory is what is taken of a budget, in bytes.
type Memory struct {
	Budget      string // the word of flows_cut_total for it
	Used, Total int64
	Saving      bool // buffers are small because of it
}

// Traffic is what a route has moved until now, or with an empty Route a whole listener.
type Traffic struct {
	Listener, Route string
	Live            int
	Up, Down        int64
}

// Listener is one of the configuration.
type Listener struct {
	Name    string
	Drained bool
}

// Datapath is one that the configuration may name.
type Datapath struct {
	Name       string
	On, Wanted bool
	Flows      int
	Stalls     uint64
	Clamped    uint64
}

// Target is one that was connected to, or that is checked.
type Target struct {
	Name        string
	Up          bool
	Connections int64            // that were made to it
	Checks      map[string]int64 // of its health, by result; nil: there are none
}

// Certificate is one that a listener serves.
type Certificate struct {
	Listener, Name string
	NotAfter       time.Time
}

// ACME is a name whose certificate comes by ACME.
type ACME struct {
	Listener, Name string
	OK             bool
}

// MostNames bounds how many targets, certificates and names of ACME are shown, each.
const MostNames = 1000

const (
	routesBound = " The first 1000 routes of the daemon have series of their own, those of the configuration before " +
		"those of containers' labels; the others are counted as route=\"other\" of their listener."
	namesBound = " At most 1000 are shown."
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("tailsplice_"+name, help, labels, nil)
}

var (
	flowsNow    = desc("flows", "Flows that are open now.")
	requestsNow = desc("requests", "HTTP requests in progress now.")
	heldNow     = desc("held", "Connections and HTTP requests that wait for a target that can't be reached now, as hold has them.")
	bytesTotal  = desc("bytes_total", "Bytes that flows have transferred, including those of open flows. up is from the "+
		"client to the target. On http and https listeners: the bytes of connections of clients, including TLS.",
		"listener", "direction")
	routeFlows = desc("route_flows", "Flows of a route that are open now; on http and https listeners requests in "+
		"progress."+routesBound, "listener", "route")
	routeBytes = desc("route_bytes_total", "Bytes that the flows of a route have transferred, including those of open "+
		"flows. up is from the client to the target. On http and https listeners: the bytes of the bodies of requests "+
		"(up) and responses (down)."+routesBound, "listener", "route", "direction")
	drained    = desc("listener_drained", "1 while tailsplice drain has closed the listener.", "listener")
	datapathOn = desc("datapath_on", "1 while the datapath takes flows; 0 if it is not loaded, is not available, or was "+
		"switched off after many failures until the daemon is restarted. tailsplice status says why. Flows are then "+
		"carried in userspace.", "datapath")
	wanted       = desc("datapath_wanted", "1 if the configuration asks for the datapath, by its name or by auto.", "datapath")
	datapathFlow = desc("datapath_flows", "Flows that the datapath carries now.", "datapath")
	stalls       = desc("datapath_stalls_total", "Times that a flow of this datapath had stopped with bytes to transfer, "+
		"and continued up to 3 s late because the daemon checked it. It should stay 0: each one is a defect of the "+
		"daemon or the kernel, and worth a report.", "datapath")
	clamped = desc("datapath_clamped_segments_total", "Segments whose payload the datapath has dropped, to bound the "+
		"memory of a flow in the kernel. Their senders send it again.", "datapath")
	targetUp = desc("target_up", "1 if the target is up by its health checks. Without any: 1 if the last connection to "+
		"it succeeded, 0 if it failed; a target to which nobody has connected since the start is absent."+namesBound, "target")
	targetChecks = desc("health_checks_total", "Health checks of the target, by result: ok, failed, or unclear, which says "+
		"nothing of the target, because this host lacked something."+namesBound, "target", "result")
	targetConns = desc("target_connections_total", "Connections to the target that were made for flows and requests."+
		namesBound, "target")
	disabled = desc("target_disabled", "1 while tailsplice target disable lets no new connection go to the target, which "+
		"else is absent."+namesBound, "target")
	notAfter = desc("certificate_not_after_timestamp_seconds", "When the certificate expires, as a Unix time. The days "+
		"that are left are (x - time()) / 86400."+namesBound, "listener", "certificate")
	acmeOK = desc("acme_ok", "1 if the last attempt to get the certificate of a name by ACME succeeded, 0 if it failed. "+
		"A name whose first attempt has not ended is absent, and one of on_demand until it has a certificate."+namesBound,
		"listener", "name")
	memoryUsed = desc("memory_used_bytes", "Memory that is taken of the budget: of limits.memory by this process, its "+
		"pipes and TCP sockets (those of its cgroup, or where none says it of the machine), of tcp_memory by all TCP "+
		"sockets of the machine.", "budget")
	memoryBudget = desc("memory_budget_bytes", "What there is of it: limits.memory, or the middle number of "+
		"net.ipv4.tcp_mem. 0: not known.", "budget")
	memorySaving = desc("memory_saving", "1 while so much of the budget is taken that less is buffered for each flow.", "budget")
	problems     = desc("problems", "Parts of the configuration that do not work now. tailsplice status and /readyz say "+
		"what is wrong. The daemon is not ready while one of address, certificate or default is not 0, or a file of deny "+
		"could not be read at the start.", "part")
)

// collector shows what it is told at each scrape, so that all of one page is of one moment.
type collector func() State

// Describe implements prometheus.Collector.
func (collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{flowsNow, requestsNow, heldNow, bytesTotal, routeFlows, routeBytes, drained, datapathOn, wanted,
		datapathFlow, stalls, clamped, targetUp, targetChecks, targetConns, disabled, notAfter, acmeOK, problems,
		memoryUsed, memoryBudget, memorySaving} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (now collector) Collect(ch chan<- prometheus.Metric) {
	send := func(d *prometheus.Desc, kind prometheus.ValueType, v float64, labels ...string) {
		for i := range labels {
			// else it is a panic; the name of a file may be anything
			labels[i] = strings.ToValidUTF8(labels[i], "\ufffd")
		}
		ch <- prometheus.MustNewConstMetric(d, kind, v, labels...)
	}
	gauge := func(d *prometheus.Desc, v float64, labels ...string) { send(d, prometheus.GaugeValue, v, labels...) }
	counter := func(d *prometheus.Desc, v float64, labels ...string) { send(d, prometheus.CounterValue, v, labels...) }
	s := now()
	gauge(flowsNow, float64(s.Flows))
	gauge(requestsNow, float64(s.Requests))
	gauge(heldNow, float64(s.Held))
	for _, t := range s.Traffic {
		if t.Route == "" {
			counter(bytesTotal, float64(t.Up), t.Listener, "up")
			counter(bytesTotal, float64(t.Down), t.Listener, "down")
			continue
		}
		gauge(routeFlows, float64(t.Live), t.Listener, t.Route)
		counter(routeBytes, float64(t.Up), t.Listener, t.Route, "up")
		counter(routeBytes, float64(t.Down), t.Listener, t.Route, "down")
	}
	for _, l := range s.Listeners {
		gauge(drained, bit(l.Drained), l.Name)
	}
	for _, d := range s.Datapaths {
		gauge(datapathOn, bit(d.On), d.Name)
		gauge(wanted, bit(d.Wanted), d.Name)
		gauge(datapathFlow, float64(d.Flows), d.Name)
		counter(stalls, float64(d.Stalls), d.Name)
		counter(clamped, float64(d.Clamped), d.Name)
	}
	for _, t := range s.Targets[:min(len(s.Targets), MostNames)] {
		gauge(targetUp, bit(t.Up), t.Name)
		counter(targetConns, float64(t.Connections), t.Name)
		for result, n := range t.Checks {
			counter(targetChecks, float64(n), t.Name, result)
		}
	}
	for _, name := range s.Disabled[:min(len(s.Disabled), MostNames)] {
		gauge(disabled, 1, name)
	}
	for _, c := range s.Certificates[:min(len(s.Certificates), MostNames)] {
		gauge(notAfter, float64(c.NotAfter.Unix()), c.Listener, c.Name)
	}
	for _, a := range s.ACME[:min(len(s.ACME), MostNames)] {
		gauge(acmeOK, bit(a.OK), a.Listener, a.Name)
	}
	for _, m := range s.Memory {
		gauge(memoryUsed, float64(m.Used), m.Budget)
		gauge(memoryBudget, float64(m.Total), m.Budget)
		gauge(memorySaving, bit(m.Saving), m.Budget)
	}
	for part, n := range s.Problems {
		gauge(problems, float64(n), part)
	}
}

func bit(v bool) float64 {
	if v {
		return 1
	}
	return 0
}
