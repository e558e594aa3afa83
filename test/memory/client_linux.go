package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A result is what a good client notices.
type result struct {
	p50, p99      time.Duration // until the first byte comes, from before connect
	tried, failed int
	opened        int     // connections, of all kinds
	paced         float64 // MB a second through one flow at a time, by a client with a line
	bulk          float64 // the same without a line: what the processor bears
	bulkFailed    int     // transfers
	fault         string  // of the last one that failed
}

func (r result) String() string {
	return fmt.Sprintf("first byte p50 %.1f ms, p99 %.1f ms (%d of %d failed), %.2f MB/s by its line, %.2f without one",
		ms(r.p50), ms(r.p99), r.failed, r.tried, r.paced, r.bulk)
}

const patience = 10 * time.Second // of a good client

// untilServed waits until flows are served.
func (v *visitor) untilServed(most time.Duration) error {
	for deadline := time.Now().Add(most); ; time.Sleep(200 * time.Millisecond) {
		c, err := v.ask("ping.test", time.Second)
		if err == nil {
			abort(c)
			return nil
		}
		if time.Now().After(deadline) {
			return err
		}
	}
}

// flowsASecond is how many flows begin, and end, where sixteen are always asked for.
func (v *visitor) flowsASecond(d time.Duration) float64 {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	var n atomic.Int64
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for ctx.Err() == nil {
				if c, err := v.ask("ping.test", patience); err == nil {
					n.Add(1)
					abort(c)
				}
			}
		})
	}
	began := time.Now()
	wg.Wait()
	return float64(n.Load()) / time.Since(began).Seconds()
}

// measure takes each for first bytes, and for throughput; more where one request takes longer.
func (v *visitor) measure(each time.Duration) (r result) {
	var took []time.Duration
	for end := time.Now().Add(each); time.Now().Before(end); {
		began := time.Now()
		c, err := v.ask("ping.test", patience)
		r.tried++
		r.opened++
		if err != nil {
			r.failed++
			took = append(took, max(patience, time.Since(began)))
			time.Sleep(100 * time.Millisecond)
			continue
		}
		took = append(took, time.Since(began))
		abort(c)
	}
	slices.Sort(took)
	r.p50, r.p99 = took[len(took)/2], took[len(took)*99/100]
	r.paced = v.transfers(each, v.line, &r)
	r.bulk = v.transfers(each, 0, &r)
	return r
}

// transfers takes bulk, one flow after the other, for so long, and gives the MB a second. line is how many
// bytes a second the client can take at most; 0: any number. What fails is counted in r.
func (v *visitor) transfers(each time.Duration, line float64, r *result) (rate float64) {
	var bytes int64
	began := time.Now()
	for time.Since(began) < each {
		n, err := v.transfer(line)
		r.opened++
		bytes += n
		if err != nil {
			r.bulkFailed++
			r.fault = fmt.Sprintf(", the last one after %d KiB: %v", n>>10, err)
			time.Sleep(100 * time.Millisecond)
		}
	}
	return float64(bytes) / (1 << 20) / time.Since(began).Seconds()
}

// transfer takes bulkBytes through a new flow.
func (v *visitor) transfer(line float64) (n int64, err error) {
	c, err := v.open("bulk.test", 1)
	if err != nil {
		return 0, err
	}
	defer abort(c)
	c.SetReadDeadline(time.Now().Add(patience))
	n, err = io.Copy(io.Discard, &pacedReader{c, line, time.Now()})
	if err == nil && n != bulkBytes {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// A pacedReader reads what a line lets through.
type pacedReader struct {
	r    io.Reader
	line float64   // bytes a second; 0: any number
	next time.Time // there may be a read
}

func (p *pacedReader) Read(b []byte) (int, error) {
	if p.line == 0 {
		return p.r.Read(b)
	}
	time.Sleep(time.Until(p.next))
	n, err := p.r.Read(b[:min(len(b), 16<<10)])
	p.next = p.next.Add(time.Duration(float64(n) / p.line * float64(time.Second)))
	return n, err
}

// metrics are the daemon's, as text.
func metrics() (string, error) {
	client := http.Client{Timeout: time.Minute}
	resp, err := client.Get("http://" + edgeAddr + ":9464/metrics")
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return string(text), err
}

// accounts are what the daemon says of itself.
type accounts struct {
	accepted float64 // connections
	used     float64 // of limits.memory, in bytes
}

func readAccounts() (a accounts, err error) {
	text, err := metrics()
	found := 0
	for name, to := range map[string]*float64{`tailsplice_connections_accepted_total{listener="web"} `: &a.accepted,
		`tailsplice_memory_used_bytes{budget="memory"} `: &a.used} {
		if _, rest, ok := strings.Cut(text, "\n"+name); ok {
			fmt.Sscan(rest, to)
			found++
		}
	}
	if found < 2 {
		return a, errors.Join(errors.New("the daemon does not say what it has accepted and used"), err)
	}
	return a, nil
}

// refusals are what the daemon says that it has refused and ended.
func refusals() string {
	text, err := metrics()
	if err != nil {
		return err.Error()
	}
	var all []string
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "} ")
		for prefix, word := range map[string]string{"tailsplice_connections_refused_total{": "refused", "tailsplice_flows_cut_total{": "cut"} {
			if strings.HasPrefix(name, prefix) && value != "0" {
				_, reason, _ := strings.Cut(name, `reason="`)
				all = append(all, fmt.Sprintf("%s %s %s", word, strings.Trim(reason, `"`), value))
			}
		}
	}
	slices.Sort(all)
	return orElse(strings.Join(all, ", "), "nothing was refused")
}
