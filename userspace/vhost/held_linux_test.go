package vhost

import (
	"net"
	"testing"
	"time"
)

// TestQueued: what an upstream has not taken of requests is not held for clients who do not read answers.
func TestQueued(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	client, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	server.(*net.TCPConn).SetReadBuffer(4 << 10)
	client.(*net.TCPConn).SetWriteBuffer(4 << 10)
	client.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
	for err == nil {
		_, err = client.Write(make([]byte, 4<<10))
	}
	if n := queued(client); n != 0 {
		t.Errorf("%d bytes of requests count", n)
	}
	if n := queued(server); n == 0 {
		t.Error("what was received does not count")
	}
}
