package sni

const (
	recordHeaderLen  = 5
	messageHeaderLen = 4
	maxPlaintext     = 1 << 14 // bytes in a TLSPlaintext fragment, RFC 8446 section 5.1

	recordChangeCipherSpec = 20
	recordHandshake        = 22
	recordHeartbeat        = 24
	typeClientHello        = 1

	// maxHello is the longest ClientHello that its grammar allows (RFC 8446 section 4.1.2), header included.
	maxHello = messageHeaderLen + 2 + 32 + (1 + 32) + (2 + 0xffff) + (1 + 0xff) + (2 + 0xffff)
)

// scanner finds the ClientHello in a growing prefix of a stream. It remembers where it was, so that the work
// of all calls together is linear in the bytes of the stream, however they arrive.
type scanner struct {
	maxMessage int // limit for the handshake message, bytes
	maxWire    int // limit for the records that carry it, bytes

	off  int    // where the next record begins
	need int    // length of the prefix below which no progress is possible
	msg  []byte // the handshake message so far; aliases the stream until a second record comes
	size int    // its full length with its header, 0 while unknown
}

// next goes on with b, the whole stream so far, and returns the hello when b contains all of it.
func (s *scanner) next(b []byte) (Hello, error) {
	if len(b) < s.need {
		return Hello{}, ErrIncomplete
	}
	for s.size == 0 || len(s.msg) < s.size {
		if err := s.record(b); err != nil {
			return Hello{}, err
		}
	}
	h, err := parseMessage(s.msg[:s.size])
	if err != nil {
		return Hello{}, err
	}
	h.Length = s.off
	return h, nil
}

// record takes one more record. What it says depends on the stream's bytes only, not on how many of them came
// at once, because each byte is judged in its turn.
func (s *scanner) record(b []byte) error {
	if s.off+recordHeaderLen+1 > s.maxWire {
		return ErrTooLarge
	}
	rec := b[s.off:]
	s.need = s.off + len(rec) + 1
	if len(rec) < 1 {
		return ErrIncomplete
	}
	// The version is to be ignored (RFC 8446 section 5.1), but in the first record its major part tells TLS
	// from noise and from DTLS.
	if s.off == 0 {
		if rec[0] < recordChangeCipherSpec || rec[0] > recordHeartbeat {
			return ErrNotTLS
		}
		if len(rec) < 2 {
			return ErrIncomplete
		}
		if rec[1] != 3 {
			return ErrNotTLS
		}
	}
	if rec[0] != recordHandshake {
		if s.off == 0 {
			return reject(AlertUnexpectedMessage, "the first record is not a handshake record")
		}
		return reject(AlertUnexpectedMessage, "another record is mixed into the hello")
	}
	if len(rec) < recordHeaderLen {
		return ErrIncomplete
	}
	n := int(rec[3])<<8 | int(rec[4])
	switch {
	case n == 0:
		return reject(AlertUnexpectedMessage, "empty handshake record")
	case n > maxPlaintext:
		return reject(AlertRecordOverflow, "handshake record of more than 16384 bytes")
	}
	end := s.off + recordHeaderLen + n
	if end > s.maxWire {
		return ErrTooLarge
	}
	s.need = end
	if len(b) < end {
		return ErrIncomplete
	}
	payload := b[s.off+recordHeaderLen : end : end]
	if s.msg == nil {
		s.msg = payload // its capacity ends here, so that append copies
	} else {
		s.msg = append(s.msg, payload...)
	}
	s.off = end
	return s.message()
}

// message looks at the handshake header as soon as it is there.
func (s *scanner) message() error {
	if s.msg[0] != typeClientHello {
		return reject(AlertUnexpectedMessage, "the first handshake message is no ClientHello")
	}
	if s.size != 0 || len(s.msg) < messageHeaderLen {
		return nil
	}
	size := messageHeaderLen + int(s.msg[1])<<16 + int(s.msg[2])<<8 + int(s.msg[3])
	switch {
	case size > maxHello:
		return reject(AlertDecodeError, "the hello says that it is longer than any can be")
	case size > s.maxMessage:
		return ErrTooLarge
	}
	s.size = size
	return nil
}
