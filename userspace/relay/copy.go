package relay

import "io"

// bufferSize is what one read takes at most, in bytes.
const bufferSize = 32 << 10

// copyAny is the pump for any pair of connections. It holds its buffer also while it waits.
func (p *pump) copyAny() (bad *side, err error) {
	b := p.relay.buffers.Get().(*[bufferSize]byte)
	defer p.relay.buffers.Put(b)
	buf := b[:min(len(b), p.limit)]
	for {
		n, err := p.src.conn.Read(buf)
		if n > 0 {
			m, err := p.dst.conn.Write(buf[:n])
			p.moved.Add(int64(m))
			if err != nil {
				return p.dst, &sideError{"write to", p.dst.name(), err}
			}
		}
		if err == io.EOF {
			return nil, nil
		}
		if err != nil {
			return p.src, &sideError{"read from", p.src.name(), err}
		}
	}
}
