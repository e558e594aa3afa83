package wire

import (
	"bytes"
	"os"
	"testing"

	"github.com/tailsplice/tailsplice/tcpsock"
)

// The kernel's own TCP passes all cases, with nothing in between: else they would be wrong.
func TestCases(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	n := New(t)
	for _, k := range Cases() {
		t.Run(k.Name, func(t *testing.T) {
			c, kernel := n.Connect(t)
			defer kernel.Close()
			tcpsock.Control(kernel, tcpsock.KeepUrgent) // without it a byte is lost, which is the fault of whoever reads
			if err := kernel.SetReadBuffer(16 << 10); k.Stopped && err != nil {
				t.Fatal(err)
			}
			if err := k.Run(c, kernel, func() {}); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("back", func(t *testing.T) {
		c, kernel := n.Answer(t)
		want := bytes.Repeat([]byte("0123456789"), 5000)
		c.SetWindow(0)
		go func() { kernel.Write(want); kernel.Close() }()
		for i := range 20 {
			c.SetWindow(uint16(i))
		}
		c.SetWindow(40_000)
		if got, err := c.Receive(len(want), true); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes of %d, %v", len(got), len(want), err)
		}
	})
}
