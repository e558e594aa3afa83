package relaytest

import (
	"cmp"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode"
)

// Programs says which programs run.
type Programs struct {
	Rows   []string      // those that have failed once
	Times  int           // that each runs in each hands; fewer where few may run at once
	Number int           // of random ones, in each hands; fewer where few may run at once
	Seed   uint64        // of these
	Shrink time.Duration // how long the first program that fails in some way is made shorter
	Most   int           // failures in one hands, after which it gives up; 0 = 20
	Loud   bool          // tells every now and then how far it is
}

// rows are programs that have failed once, as short as they were made.
var rows = []string{
	"client: / server: write 125000", // the end of the client's stream was passed on twice
	"client: write 75000 / server: end",
	"client: close / server: urgent",
	"client: end, reset / server:", // the end was lost to the reset behind it
	"client: / server: end, reset",
	// What came before the reset of a parked side was lost.
	"client: wait 3, pause 1100, write 5000, wait 5, write 1000000 / " +
		"server: write 125000, write 5000, write 45000, wait 2, stop 5, write 1000, reset",
}

// SomePrograms are rows, and random programs: few, or with -tags soak many. PROGRAMS in the environment says
// how many.
func SomePrograms() Programs {
	number := numberOf
	if n, err := strconv.Atoi(os.Getenv("PROGRAMS")); err == nil {
		number = n
	}
	return Programs{
		Rows: rows, Times: 5, Number: number, Seed: seedOf(), Shrink: time.Minute, Loud: number > 1000,
	}
}

// RunPrograms runs programs in all hands at once, many in each, and says what the ends of a flow saw that TCP
// does not do. A program that fails is printed as a row, after what can be left out of it while it still
// fails.
func RunPrograms(t *testing.T, hands []Hands, c Programs) {
	before := take(hands[0].Path)
	begin := time.Now()
	var all sync.WaitGroup
	var ran atomic.Int64
	for _, h := range hands {
		all.Go(func() {
			runAll(t, h, c, &ran)
			if c.Loud {
				fmt.Printf("programs: %s is done in %v\n", h.Name, time.Since(begin).Round(time.Second))
			}
		})
	}
	if c.Loud {
		stop := make(chan struct{})
		defer close(stop)
		go func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(20 * time.Second):
					fmt.Printf("programs: %d have run in %v\n", ran.Load(), time.Since(begin).Round(time.Second))
				}
			}
		}()
	}
	all.Wait()
	t.Logf("%d programs of seed %d ran in %v", ran.Load(), c.Seed, time.Since(begin).Round(time.Second/10))
	before.check(t, hands[0].Path)
}

// runAll runs all programs in the hands h.
func runAll(t *testing.T, h Hands, c Programs, ran *atomic.Int64) {
	var programs []Program
	for _, row := range c.Rows {
		p, err := ParseProgram(row)
		if err != nil {
			t.Error(err)
			return
		}
		programs = append(programs, slices.Repeat([]Program{p}, max(1, c.Times*h.atOnce()/usually))...)
	}
	for i := range max(c.Number*h.atOnce()/usually, min(c.Number, 10)) {
		programs = append(programs, RandomProgram(c.Seed, uint64(i)))
	}
	var next, failed atomic.Int64
	var shrunk sync.Map // kinds of faults
	var workers sync.WaitGroup
	for range h.atOnce() {
		workers.Go(func() {
			for failed.Load() < int64(cmp.Or(c.Most, 20)) {
				i := int(next.Add(1)) - 1
				if i >= len(programs) {
					return
				}
				p := programs[i]
				faults := try(t, h, p, patience)
				ran.Add(1)
				if len(faults) == 0 {
					continue
				}
				failed.Add(1)
				t.Errorf("%s: %q: %s", h.Name, p, strings.Join(faults, "\n\t"))
				if _, known := shrunk.LoadOrStore(kind(faults), true); known {
					continue
				}
				if short, again := shrink(p, failsInHands(t, h, kind(faults), time.Now().Add(c.Shrink), &faults)); again {
					t.Errorf("%s: the shortest that fails:\n\t%q,\n\t%s", h.Name, short, strings.Join(faults, "\n\t"))
				} else {
					t.Logf("%s: %q did not fail again", h.Name, p)
				}
			}
		})
	}
	workers.Wait()
}

// kind is what faults have in common with those of a program that fails for the same reason.
func kind(faults []string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsDigit(r) {
			return -1
		}
		return r
	}, faults[0])
}

// atOnce is how many programs run at once: most of what one does is waiting.
func (h Hands) atOnce() int {
	switch {
	case h.Alone:
		return 1
	case h.Most > 0:
		return h.Most
	}
	return usually
}

// usually so many programs run at once in each hands.
const usually = 40

// An attempt is a test that may fail without its being one.
type attempt struct {
	testing.TB
	faults []string
}

func (a *attempt) Errorf(format string, args ...any) {
	a.faults = append(a.faults, fmt.Sprintf(format, args...))
}
func (a *attempt) Fatalf(format string, args ...any) { a.Errorf(format, args...); runtime.Goexit() }
func (a *attempt) Fatal(args ...any)                 { a.Fatalf("%s", fmt.Sprint(args...)) }

// try runs p once.
func try(t testing.TB, h Hands, p Program, patient time.Duration) []string {
	a := &attempt{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		a.faults = append(a.faults, runProgram(a, h, p, patient)...)
	}()
	<-done
	return a.faults
}
