package relaytest

import (
	"fmt"
	"math/rand/v2"
	"strings"
)

// A Program is what the two ends of a flow do, each one step after the other, and what both do afterwards:
// they read on, and the one that has not left ends its stream and reads to the end of the other's.
type Program struct{ Client, Server []Op }

// An Op is one step of one end. While no step says otherwise, the end reads what comes.
type Op struct {
	Do string
	N  int64
}

// What an Op can do. No step waits for what TCP does not promise, so that no program stands still for ever.
const (
	opWrite  = "write"  // N bytes
	opUrgent = "urgent" // one byte, out of band
	opEnd    = "end"    // its stream
	opReset  = "reset"  // the connection, with linger 0
	opClose  = "close"  // the connection: a reset if there are bytes that it has not read, or that come later
	opStop   = "stop"   // reading, for N ms
	opSlow   = "slow"   // reading: a little at a time, for N ms
	opBuffer = "buffer" // its receive buffer is of N bytes
	opPause  = "pause"  // N ms
	opAcked  = "acked"  // waits until all that it sent is acknowledged
	opGot    = "got"    // waits until it has read what the other had sent
	opCome   = "come"   // waits until something has come that it has not read, while it has stopped
	opWait   = "wait"   // until the other has done N steps
)

// steps says which of them have a number.
var steps = map[string]bool{
	opWrite: true, opStop: true, opSlow: true, opBuffer: true, opPause: true, opWait: true,
	opUrgent: false, opEnd: false, opReset: false, opClose: false, opAcked: false, opGot: false, opCome: false,
}

// String is the program as [ParseProgram] reads it.
func (p Program) String() string {
	return "client: " + opsString(p.Client) + " / server: " + opsString(p.Server)
}

func opsString(ops []Op) string {
	var words []string
	for _, o := range ops {
		if steps[o.Do] {
			words = append(words, fmt.Sprintf("%s %d", o.Do, o.N))
		} else {
			words = append(words, o.Do)
		}
	}
	return strings.Join(words, ", ")
}

// ParseProgram reads "client: write 1000, end / server: wait 2, write 125000, end".
func ParseProgram(s string) (p Program, err error) {
	client, server, ok := strings.Cut(s, "/")
	for _, of := range []struct {
		name, text string
		ops        *[]Op
	}{{"client:", client, &p.Client}, {"server:", server, &p.Server}} {
		text, named := strings.CutPrefix(strings.TrimSpace(of.text), of.name)
		if !ok || !named {
			return p, fmt.Errorf("%q: want client: STEPS / server: STEPS", s)
		}
		for _, word := range strings.Split(text, ",") {
			var o Op
			n, _ := fmt.Sscan(word, &o.Do, &o.N)
			if strings.TrimSpace(text) == "" {
				break // no step
			}
			if numbered, known := steps[o.Do]; !known || numbered != (n == 2) {
				return p, fmt.Errorf("%q: step %q", s, word)
			}
			*of.ops = append(*of.ops, o)
		}
	}
	return p, nil
}

// RandomProgram gives the same program for the same seed and number.
func RandomProgram(seed, number uint64) Program {
	g := generator{r: rand.New(rand.NewPCG(seed, number))}
	for range 1 + g.r.IntN(10) {
		i := g.r.IntN(2)
		switch g.r.IntN(16) {
		case 0:
			g.rest(i)
		case 1:
			g.answerEarly(i)
		default:
			g.step(i)
		}
	}
	return Program{g.ends[0].ops, g.ends[1].ops}
}

// A generator makes up the steps of both ends in one order, in which a step waits only for those before it.
type generator struct {
	r    *rand.Rand
	ends [2]part
}

type part struct {
	ops         []Op
	ended, left bool
	waited      int // steps of the other that it has waited for
}

// does adds a step to one end, and what it brings with it.
func (g *generator) does(i int, do string, n int64) {
	e := &g.ends[i]
	if e.left || e.ended && (do == opWrite || do == opUrgent || do == opEnd) {
		return
	}
	e.ops = append(e.ops, Op{do, n})
	e.ended = e.ended || do == opEnd
	e.left = do == opReset || do == opClose
}

// waits makes one end wait for all that the other one has to do so far.
func (g *generator) waits(i int) {
	e, n := &g.ends[i], len(g.ends[1-i].ops)
	if n > e.waited && !e.left {
		e.ops = append(e.ops, Op{opWait, int64(n)})
		e.waited = n
	}
}

// rest leaves the flow alone until it is parked.
func (g *generator) rest(i int) {
	g.waits(i)
	g.does(i, opPause, 1100)
	g.waits(1 - i)
}

// answerEarly is an upload that is answered before it was read.
func (g *generator) answerEarly(i int) {
	g.does(i, opStop, 300)
	g.waits(1 - i)
	g.does(1-i, opWrite, 1_000_000)
	g.does(i, opCome, 0)
	g.does(i, opWrite, []int64{1000, few}[g.r.IntN(2)])
	g.does(i, []string{opReset, opClose}[g.r.IntN(2)], 0)
}

func (g *generator) step(i int) {
	if g.ends[i].left {
		return
	}
	if g.r.IntN(2) == 0 {
		g.waits(i)
	}
	do, n := g.pick(g.ends[i].ended), int64(0)
	switch do {
	case opWrite:
		// From nothing to what fills all buffers on the way.
		sizes := []int64{1, 100, 1000, 5000, few, many, 190_000, 300_000, 1_000_000}
		n = sizes[min(g.r.IntN(len(sizes)), g.r.IntN(len(sizes)+2))]
	case opStop, opSlow, opPause:
		n = []int64{1, 5, 20, 20, 100, 100, 300, 700}[g.r.IntN(8)]
	case opBuffer:
		n = []int64{16 << 10, 32 << 10, 64 << 10}[g.r.IntN(3)]
	}
	g.does(i, do, n)
	if do == opStop && g.r.IntN(2) == 0 {
		g.does(i, opCome, 0)
	}
}

// pick gives the next step, of an end that has ended its stream or not.
func (g *generator) pick(ended bool) string {
	weights := []struct {
		do     string
		weight int
	}{
		{opStop, 8}, {opSlow, 5}, {opBuffer, 3}, {opPause, 8}, {opAcked, 8}, {opGot, 6}, {opReset, 7}, {opClose, 6},
		{opWrite, 40}, {opUrgent, 2}, {opEnd, 12},
	}
	if ended {
		weights = weights[:len(weights)-3]
	}
	all := 0
	for _, w := range weights {
		all += w.weight
	}
	n := g.r.IntN(all)
	for _, w := range weights {
		if n -= w.weight; n < 0 {
			return w.do
		}
	}
	panic("unreachable")
}
