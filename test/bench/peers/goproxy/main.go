// Command goproxy is the plain baseline: what a Go programmer writes in an afternoon. Usage: goproxy LISTEN
// NAME SERVER
package main

import (
	"bytes"
	"crypto/tls"
	"io"
	"log"
	"net"
	"os"
)

func main() {
	ln, err := net.Listen("tcp", os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	for {
		if c, err := ln.Accept(); err == nil {
			go serve(c.(*net.TCPConn))
		}
	}
}

func serve(down *net.TCPConn) {
	defer down.Close()
	var head bytes.Buffer
	name := ""
	tls.Server(peek{down, io.TeeReader(down, &head)}, &tls.Config{GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		name = h.ServerName
		return nil, io.EOF
	}}).Handshake()
	if name != os.Args[2] {
		return
	}
	c, err := net.Dial("tcp", os.Args[3])
	if err != nil {
		return
	}
	up := c.(*net.TCPConn)
	defer up.Close()
	up.Write(head.Bytes())
	done := make(chan struct{})
	go func() { io.Copy(up, down); up.CloseWrite(); close(done) }()
	io.Copy(down, up)
	down.CloseWrite()
	<-done
}

// peek reads the hello and answers nothing.
type peek struct {
	net.Conn
	io.Reader
}

func (p peek) Read(b []byte) (int, error)  { return p.Reader.Read(b) }
func (p peek) Write(b []byte) (int, error) { return len(b), nil }
