package sni

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// refuser reads hellos on the loopback interface and refuses them all.
func refuser(t *testing.T, refuse func(net.Conn, uint8) error) (addr string) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				if _, _, err := Read(c, nil, 64<<10, patience); err != nil {
					c.Close()
					return
				}
				if err := refuse(c, AlertUnrecognizedName); err != nil {
					t.Errorf("refuse: %v", err)
				}
			}()
		}
	}()
	return ln.Addr().String()
}

// TestRefuse: a client of every version must understand why it is sent away.
func TestRefuse(t *testing.T) {
	addr := refuser(t, Refuse)
	for version := uint16(tls.VersionTLS10); version <= tls.VersionTLS13; version++ {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			_, err := tls.Dial("tcp", addr, &tls.Config{ServerName: "nobody.example", MinVersion: version, MaxVersion: version})
			var alert tls.AlertError
			if err == nil || !strings.Contains(err.Error(), "unrecognized name") {
				t.Errorf("crypto/tls says %v (%v)", err, errors.As(err, &alert))
			}
		})
	}
	t.Run("openssl", func(t *testing.T) {
		openssl := need(t, "openssl")
		for _, version := range []string{"-tls1", "-tls1_1", "-tls1_2", "-tls1_3"} {
			args := []string{"s_client", "-connect", addr, "-servername", "nobody.example", version}
			if version < "-tls1_2" {
				args = append(args, "-cipher", "ALL:@SECLEVEL=0")
			}
			out, _ := run(t, openssl, args...)
			if !strings.Contains(out, "alert number 112") {
				t.Errorf("%s: openssl says %s", version, out)
			}
		}
	})
	t.Run("curl", func(t *testing.T) {
		curl := need(t, "curl")
		_, port, _ := net.SplitHostPort(addr)
		out, err := run(t, curl, "-sS", "--connect-to", "::127.0.0.1:"+port, "https://nobody.example/")
		if err == nil || !strings.Contains(out, "unrecognized name") {
			t.Errorf("curl says %s (%v)", out, err)
		}
	})
}

func run(t *testing.T, program string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, program, args...).CombinedOutput()
	return string(out), err
}

// chatty is a client that goes on sending, as one with early data does, before it looks for an answer: some of
// it is there when the alert is sent, and some comes after the server has closed its first half, or all. It
// returns what it got, and what went wrong on the way: a client whose write fails rarely looks at what it
// could still read.
func chatty(t *testing.T, refuse func(net.Conn, uint8) error) ([]byte, error) {
	client, server := pair(t)
	client.SetDeadline(time.Now().Add(patience))
	client.Write(make([]byte, 4<<10))
	var failed error
	late := func() {
		for range 8 {
			if _, err := client.Write(make([]byte, 4<<10)); err != nil {
				failed = err
			}
		}
	}
	if err := refuse(&closing{TCPConn: server, closed: sync.OnceFunc(late)}, AlertUnrecognizedName); err != nil {
		t.Errorf("refuse: %v", err)
	}
	got, err := io.ReadAll(client)
	return got, errors.Join(failed, err)
}

// closing calls closed once a direction, or both, have been closed.
type closing struct {
	*net.TCPConn
	closed func()
}

func (c *closing) CloseWrite() error { defer c.closed(); return c.TCPConn.CloseWrite() }
func (c *closing) Close() error      { defer c.closed(); return c.TCPConn.Close() }

// TestRefuseSurvivesUnreadData: the alert must arrive although the client is still sending. The second half shows that
// the test can fail: a plain close loses the alert.
func TestRefuseSurvivesUnreadData(t *testing.T) {
	got, err := chatty(t, Refuse)
	if err != nil || !bytes.Equal(got, Alert(AlertUnrecognizedName)) {
		t.Errorf("got %x, %v; want the alert and a clean end", got, err)
	}
	got, err = chatty(t, func(c net.Conn, desc uint8) error {
		writeAlert(c, desc)
		return c.Close()
	})
	if err == nil {
		t.Errorf("a plain close gave the client %x without an error: this test shows nothing", got)
	}
}

// TestRefuseIsBounded: a client that does not close, goes on sending, or does not even read, holds us no longer than
// documented, by a clock that moves only while everybody waits.
func TestRefuseIsBounded(t *testing.T) {
	alert := func(c net.Conn) { io.ReadFull(c, make([]byte, len(Alert(0)))) }
	tests := []struct {
		name   string
		client func(net.Conn)
		took   time.Duration
	}{
		{"closes", func(c net.Conn) { alert(c); c.Close() }, 0},
		{"does not read", func(net.Conn) {}, alertWriteTimeout},
		{"reads and does nothing", alert, drainTimeout},
		{"trickles", func(c net.Conn) {
			alert(c)
			for {
				if _, err := c.Write([]byte{0}); err != nil {
					return
				}
				time.Sleep(drainTimeout / 50)
			}
		}, drainTimeout},
		{"floods", func(c net.Conn) { alert(c); io.Copy(c, zeros{}) }, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, server := net.Pipe()
				var talking sync.WaitGroup
				talking.Go(func() { tt.client(client) })
				start := time.Now()
				if err := Refuse(halves{server}, AlertUnrecognizedName); (err != nil) != (tt.took == alertWriteTimeout) {
					t.Error(err)
				}
				if d := time.Since(start); d != tt.took {
					t.Errorf("took %v, want %v", d, tt.took)
				}
				if _, err := server.Write([]byte{0}); !errors.Is(err, io.ErrClosedPipe) {
					t.Errorf("not closed: %v", err)
				}
				talking.Wait()
			})
		})
	}
}

// halves gives a pipe what [Refuse] looks for; the pipe has no halves to close.
type halves struct{ net.Conn }

func (halves) CloseWrite() error { return nil }

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// TestRefuseDead: a client that is gone is no reason to keep the socket.
func TestRefuseDead(t *testing.T) {
	client, server := pair(t)
	client.SetLinger(0)
	client.Close()
	server.SetDeadline(time.Now().Add(patience))
	server.Read(make([]byte, 1)) // until the reset is there
	if err := Refuse(server, AlertUnrecognizedName); err == nil {
		t.Error("no error although the client was gone")
	}
	if _, err := server.Write([]byte{0}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("not closed: %v", err)
	}
}

func TestAlertFor(t *testing.T) {
	for _, err := range []error{nil, ErrNotTLS, ErrTimeout, ErrEOF, ErrIncomplete, io.ErrUnexpectedEOF} {
		if desc, ok := AlertFor(err); ok {
			t.Errorf("%v: alert %d", err, desc)
		}
	}
	if desc, ok := AlertFor(ErrTooLarge); !ok || desc != AlertInternalError {
		t.Errorf("ErrTooLarge: %d, %v", desc, ok)
	}
}
