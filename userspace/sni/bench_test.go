package sni

import (
	"os"
	"path/filepath"
	"testing"
)

func BenchmarkParse(b *testing.B) {
	chromium, err := os.ReadFile(filepath.Join("testdata", "chromium.hello"))
	if err != nil {
		b.Fatal(err)
	}
	long := message(0x303, builder{}.serverName("a.b").alpn("h2").ext(21, make([]byte, 16<<10)))
	for _, bb := range []struct {
		name   string
		stream []byte
		allocs float64 // at most
	}{
		{"chromium", chromium, 2},
		{"name only", records(message(0x303, builder{}.serverName("example.org").versions(0x304, 0x303)), maxPlaintext), 1},
		{"no name", records(message(0x303, nil), maxPlaintext), 0},
		{"chromium in records of one byte", refragment(chromium, len(chromium), 1), 20},
		{"16 KiB in records of one byte", records(long, 1), 40},
	} {
		b.Run(bb.name, func(b *testing.B) {
			if n := testing.AllocsPerRun(10, func() { _, _ = Parse(bb.stream) }); n > bb.allocs {
				b.Errorf("%v allocations, want at most %v", n, bb.allocs)
			}
			b.ReportAllocs()
			b.SetBytes(int64(len(bb.stream)))
			for b.Loop() {
				if _, err := Parse(bb.stream); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkRead includes the buffer and the reads, not the kernel.
func BenchmarkRead(b *testing.B) {
	chromium, err := os.ReadFile(filepath.Join("testdata", "chromium.hello"))
	if err != nil {
		b.Fatal(err)
	}
	for _, bb := range []struct {
		name   string
		stream []byte
		step   int
	}{
		{"at once", chromium, 0},
		{"byte by byte", chromium, 1},
		{"byte by byte in records of one byte", refragment(chromium, len(chromium), 1), 1},
	} {
		b.Run(bb.name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(bb.stream)))
			c := new(script)
			for b.Loop() {
				*c = script{rest: bb.stream, step: bb.step}
				if _, _, err := Read(c, nil, 64<<10, 0); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestAllocations holds the benchmark's counts in every test run.
func TestAllocations(t *testing.T) {
	chromium, err := os.ReadFile(filepath.Join("testdata", "chromium.hello"))
	if err != nil {
		t.Fatal(err)
	}
	// One for the name, one for the list of protocols.
	if n := testing.AllocsPerRun(100, func() { _, _ = Parse(chromium) }); n > 2 {
		t.Errorf("Parse of a browser's hello makes %v allocations, want at most 2", n)
	}
	if n := testing.AllocsPerRun(100, func() { _, _, _ = Read(&script{rest: chromium}, nil, 64<<10, 0) }); n > 4 {
		t.Errorf("Read of a browser's hello makes %v allocations, want at most 4 with the test's own", n)
	}
}
