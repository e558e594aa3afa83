package vhost

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
)

// TestFrames measures, by a clock of its own, how long it takes to read frames that bring no answer, in reads
// of all sizes, beside such that do.
func TestFrames(t *testing.T) {
	const n = 1500
	write := func(do func(f *http2.Framer) error) []byte {
		var b bytes.Buffer
		f := http2.NewFramer(&b, nil)
		f.AllowIllegalWrites = true
		for range n {
			if err := do(f); err != nil {
				t.Fatal(err)
			}
		}
		return b.Bytes()
	}
	ping := write(func(f *http2.Framer) error { return f.WritePing(false, [8]byte{1}) })
	headers := write(func(f *http2.Framer) error {
		return f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x82}, EndHeaders: true})
	})
	// A request for each of what do writes, and one for all.
	uploads := func(do func(f *http2.Framer, id uint32) error) []byte {
		id := uint32(1)
		return write(func(f *http2.Framer) error {
			err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: []byte{0x83}, EndHeaders: true})
			id += 2
			return errors.Join(err, do(f, id-2))
		})
	}
	upload := func(do func(f *http2.Framer) error) []byte {
		var first bytes.Buffer
		if err := http2.NewFramer(&first, nil).WriteHeaders(http2.HeadersFrameParam{StreamID: 1,
			BlockFragment: []byte{0x83}, EndHeaders: true}); err != nil {
			t.Fatal(err)
		}
		return append(first.Bytes(), write(do)...)
	}
	const slow = (n - frameBurst) * time.Second / framesPerSecond
	one := func(do func(f *http2.Framer) error) []byte { b := write(do); return b[:len(b)/n] }
	acked := one(func(f *http2.Framer) error { return f.WritePing(true, [8]byte{1}) })
	small := one(func(f *http2.Framer) error { return f.WriteData(1, false, make([]byte, 13)) })
	large := one(func(f *http2.Framer) error { return f.WriteData(1, false, make([]byte, 16<<10)) })
	noContent := one(func(f *http2.Framer) error {
		return f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x89}, EndHeaders: true, EndStream: true})
	})
	answered := one(func(f *http2.Framer) error { return f.WriteRSTStream(1, http2.ErrCodeNo) })
	for _, c := range []struct {
		name   string
		frames []byte
		answer []byte // to each n-th part of frames
		hop    bool
		want   time.Duration
	}{
		{"PING", ping, nil, false, slow},
		{"PING, with acks that are read", ping, acked, false, slow},
		{"PING of a hop", ping, nil, true, 0},
		{"SETTINGS", write((*http2.Framer).WriteSettingsAck), nil, false, slow},
		{"RST_STREAM", write(func(f *http2.Framer) error { return f.WriteRSTStream(1, http2.ErrCodeCancel) }), nil, false, slow},
		{"PRIORITY", write(func(f *http2.Framer) error { return f.WritePriority(1, http2.PriorityParam{}) }), nil, false, slow},
		{"CONTINUATION", write(func(f *http2.Framer) error { return f.WriteContinuation(1, false, make([]byte, 1000)) }), nil, false, slow},
		{"WINDOW_UPDATE", write(func(f *http2.Framer) error { return f.WriteWindowUpdate(0, 1) }), nil, false, slow},
		{"WINDOW_UPDATE of a reader", write(func(f *http2.Framer) error { return f.WriteWindowUpdate(0, 4096) }), large, false, 0},
		{"a client of gRPC that reads small messages", write(func(f *http2.Framer) error {
			return errors.Join(f.WriteWindowUpdate(0, 13), f.WriteWindowUpdate(1, 13), f.WritePing(false, [8]byte{1}))
		}), small, false, 0},
		{"requests", headers, nil, false, 0}, // which have limits of their own
		{"requests that are reset", write(func(f *http2.Framer) error {
			return errors.Join(f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x82}, EndHeaders: true}),
				f.WriteRSTStream(1, http2.ErrCodeCancel))
		}), nil, false, slow},
		{"requests that are answered by little, and then reset", write(func(f *http2.Framer) error {
			return errors.Join(f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x82}, EndHeaders: true}),
				f.WriteRSTStream(1, http2.ErrCodeNo))
		}), noContent, false, 0},
		{"DATA", upload(func(f *http2.Framer) error { return f.WriteData(1, false, []byte("a")) }), nil, false, 0},
		{"DATA with padding", upload(func(f *http2.Framer) error {
			return f.WriteDataPadded(1, false, make([]byte, 256), make([]byte, 100))
		}), nil, false, 0},
		{"DATA that the client can't know to be late", upload(func(f *http2.Framer) error {
			return f.WriteData(1, false, []byte("a"))
		}), answered, false, 0},
		{"empty DATA", upload(func(f *http2.Framer) error { return f.WriteData(1, false, nil) }), nil, false, slow},
		{"DATA that is padding alone", upload(func(f *http2.Framer) error {
			return f.WriteDataPadded(1, false, nil, make([]byte, 255))
		}), nil, false, slow},
		{"DATA of no request", write(func(f *http2.Framer) error { return f.WriteData(1, false, []byte("a")) }), nil, false, slow},
		{"ends", uploads(func(f *http2.Framer, id uint32) error { return f.WriteData(id, true, nil) }), nil, false, 0},
		{"the same end", upload(func(f *http2.Framer) error { return f.WriteData(1, true, nil) }), nil, false, slow},
	} {
		for _, size := range []int{1, 8, frameHeader, 1000} {
			synctest.Test(t, func(t *testing.T) {
				near, far := net.Pipe()
				cn := newConn(near, New(Options{}))
				defer cn.server.Close()
				defer cn.Close()
				if c.hop {
					cn.info.Unknown = &UnsaidError{}
				}
				go func() { io.WriteString(far, http2Preface); far.Write(c.frames); far.Close() }()
				go io.Copy(io.Discard, far)
				if _, err := io.ReadFull(cn, make([]byte, len(http2Preface))); err != nil {
					t.Fatal(err)
				}
				began, b, answered, got := time.Now(), make([]byte, size), 0, []byte(nil)
				for {
					m, err := cn.Read(b)
					got = append(got, b[:m]...)
					for ; answered < len(got)*n/len(c.frames); answered++ {
						cn.Write(c.answer)
					}
					if err != nil {
						break
					}
				}
				if !bytes.Equal(got, c.frames) {
					t.Errorf("%s in reads of %d: %d bytes of %d", c.name, size, len(got), len(c.frames))
				}
				if took := time.Since(began); took < c.want*9/10 || took > c.want*11/10 {
					t.Errorf("%s in reads of %d: %v, want %v", c.name, size, took, c.want)
				}
			})
		}
	}
}

// TestNoFrames: what is not HTTP/2 to the last byte of its preface is read as it comes.
func TestNoFrames(t *testing.T) {
	for _, s := range []string{"GET / HTTP/1.1\r\n\r\n", http2Preface[:len(http2Preface)-1] + "x", "P", "PRI * HTTP/2.0\r\n\r\nSM\r\n\rPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"} {
		near, far := net.Pipe()
		cn := newConn(near, New(Options{}))
		go func() { io.WriteString(far, s); far.Close() }()
		got, err := io.ReadAll(io.MultiReader(io.LimitReader(cn, 14), cn))
		if err != nil || string(got) != s || cn.frames != nil {
			t.Errorf("%q: %q, %v, %v", s, got, err, cn.frames)
		}
		cn.Close()
		cn.server.Close()
	}
}

// TestBodiesAreBounded: what is remembered of requests is no more than there may be at a time, and those that
// go on are never forgotten for others.
func TestBodiesAreBounded(t *testing.T) {
	var b bodies
	b.begin(frame{stream: 1})
	for id := uint32(3); id < 20_001; id += 2 {
		b.begin(frame{stream: id})
		b.answered(id)
		b.answered(id)
		if !b.goesOn(frame{stream: id, length: 1}) {
			t.Fatalf("stream %d, just answered, has no body any more", id)
		}
	}
	if len(b.open) != 1 || len(b.late) > mostLate || cap(b.late) > 4*mostLate {
		t.Errorf("%d are open, and %d late (%d)", len(b.open), len(b.late), cap(b.late))
	}
	if !b.goesOn(frame{stream: 1, length: 1}) || b.goesOn(frame{stream: 3, length: 1}) {
		t.Error("the first is forgotten, or the second not")
	}
}

// TestGivenUpRequestsAreForgotten: a client that gives requests up before their end leaves nothing behind, however
// many they are. The daemon sends no end of their answers.
func TestGivenUpRequestsAreForgotten(t *testing.T) {
	var f frames
	for id := uint32(1); id < 20_001; id += 2 {
		f.cost(frame{kind: frameHEADERS, stream: id})
		f.worth(frame{kind: frameHEADERS, stream: id}) // an answer that would have gone on
		if n := f.cost(frame{kind: frameRST, length: 4, stream: id}); n != 1 {
			t.Fatalf("giving up costs %d", n)
		}
		if n := f.cost(frame{kind: frameDATA, length: 1, stream: id}); n != 1 {
			t.Fatalf("DATA behind that costs %d", n)
		}
	}
	if n := len(f.bodies.open) + len(f.bodies.late); n != 0 {
		t.Errorf("%d requests are remembered", n)
	}
}
