package vhost

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
)

// TestAnswerBeforeReset checks that an answer arrives which the upstream gave before it had read the whole
// body, and reset the connection behind.
func TestAnswerBeforeReset(t *testing.T) {
	const size = 4 << 20
	for _, answer := range []int{100, 60_000} {
		t.Run(fmt.Sprint(answer), func(t *testing.T) {
			h := newHop(t, rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
				readHead(br)
				fmt.Fprintf(c, "HTTP/1.1 413 Too Large\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", answer, strings.Repeat("x", answer))
				c.SetLinger(0)
			}))
			for range 20 {
				status, body := upload(t, h, "", size)
				if status != http.StatusRequestEntityTooLarge || len(body) != answer {
					t.Fatalf("got %d with %d bytes", status, len(body))
				}
			}
		})
	}
}

// TestCutOffAnswerBeforeReset checks that a reset is not taken for the end of an answer without a length,
// when it is a write that hears of it, and that the client hears of it though its body may have ended just
// then.
func TestCutOffAnswerBeforeReset(t *testing.T) {
	h := newHop(t, rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
		readHead(br)
		io.WriteString(c, "HTTP/1.1 413 Too Large\r\nConnection: close\r\n\r\nhalf")
		c.SetLinger(0)
	}))
	for range 100 {
		c, br := raw(t, h, false)
		go sendUpload(c, "", 4<<20)
		if res, err := http.ReadResponse(br, nil); err == nil {
			body, err := io.ReadAll(res.Body)
			switch {
			case errors.Is(err, os.ErrDeadlineExceeded):
				t.Fatal("the client waits for ever")
			case err == nil && res.StatusCode != http.StatusBadGateway:
				t.Fatalf("%d, and %q looks whole", res.StatusCode, body)
			}
		}
		c.Close()
	}
}

// TestWholeAnswerBeforeReset checks that a reset which comes behind the end of an answer without a length, from
// who takes no more of an upload, is not taken for one that has cut it off.
func TestWholeAnswerBeforeReset(t *testing.T) {
	h := newHop(t, rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
		readHead(br)
		io.WriteString(c, "HTTP/1.1 413 Too Large\r\nConnection: close\r\n\r\nwhole")
		c.CloseWrite()
		c.SetLinger(0)
	}))
	for range 200 {
		c, br := raw(t, h, false)
		go sendUpload(c, "", 4<<20)
		res, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(err)
		}
		if body, err := io.ReadAll(res.Body); err != nil || string(body) != "whole" {
			t.Fatalf("%d, %q, %v", res.StatusCode, body, err)
		}
		c.Close()
	}
}

// TestAnswerBeforeClose checks that a client which said Connection: close isn't reset right behind the answer
// when that comes before the end of its body.
func TestAnswerBeforeClose(t *testing.T) {
	h := newHop(t, rawUpstream(t, func(c *net.TCPConn, br *bufio.Reader) {
		readHead(br)
		io.WriteString(c, "HTTP/1.1 413 Too Large\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx")
		c.CloseWrite()
		io.Copy(io.Discard, br)
	}))
	for range 10 {
		c, br := raw(t, h, false)
		go sendUpload(c, "Connection: close\r\n", 16<<20)
		res, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(err)
		}
		if body, err := io.ReadAll(res.Body); err != nil || res.StatusCode != http.StatusRequestEntityTooLarge || len(body) != 1 {
			t.Fatalf("%d, %q, %v", res.StatusCode, body, err)
		}
		if _, err := br.ReadByte(); err != io.EOF {
			t.Fatalf("after the answer: %v", err)
		}
		c.Close()
	}
}

// upload sends a body of size bytes, reads at the same time, and goes on reading when it can't send more.
func upload(t *testing.T, h *hop, header string, size int) (status int, body []byte) {
	t.Helper()
	c, br := raw(t, h, false)
	defer c.Close()
	go sendUpload(c, header, size)
	res, err := http.ReadResponse(br, nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err = io.ReadAll(res.Body)
	if err != nil {
		t.Fatalf("after %d bytes of %d: %v", len(body), res.StatusCode, err)
	}
	return res.StatusCode, body
}

func sendUpload(c net.Conn, header string, size int) {
	fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: %d\r\n%s\r\n", size, header)
	io.CopyN(c, zeros{}, int64(size))
}
