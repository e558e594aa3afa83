package oracle

import "math/rand/v2"

// Choices are the decisions by which a Grammar makes a message: random ones, or those of a fuzzer's bytes. Of
// bytes that are used up each further choice is the first of its list, which is the plain one.
type Choices struct {
	random *rand.Rand // nil for bytes
	bytes  []byte
}

// Random makes the choices of one number: the same for the same number.
func Random(seed uint64) *Choices { return &Choices{random: rand.New(rand.NewPCG(seed, 0))} }

// FromBytes takes the choices from bytes.
func FromBytes(b []byte) *Choices { return &Choices{bytes: b} }

// Int chooses a number below n, which is at least 1.
func (c *Choices) Int(n int) int {
	if c.random != nil {
		return c.random.IntN(n)
	}
	x := 0
	for span := 1; span < n && len(c.bytes) > 0; span <<= 8 {
		x, c.bytes = x<<8|int(c.bytes[0]), c.bytes[1:]
	}
	return x % n
}

// Percent says yes so often, and no for bytes that are used up.
func (c *Choices) Percent(n int) bool { return c.Int(100) >= 100-n }

// Pick chooses one of a list, which is not empty.
func Pick[T any](c *Choices, from ...T) T { return from[c.Int(len(from))] }
