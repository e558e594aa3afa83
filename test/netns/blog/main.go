// Command blog is the web site in the container at the end of the path. It answers with a page that says what
// it saw of the visitor, and with endpoints that tests measure the path by. It is one static binary for an
// image FROM scratch.
//
//	GET  /                  the page; the same facts as JSON with Accept: application/json
//	GET  /bytes?n=N&seed=S  N pseudo-random bytes, the same for the same seed; trailer X-Sha256 is their sum
//	POST /upload            the sha256 of the body, in hex, and how long it was: {"sha256":"...","bytes":N}
//	POST /echo              the body, as it comes
//	GET  /headers           the request as it arrived, as JSON
//	GET  /ws                WebSocket: every message comes back
//	GET  /sse?n=N&every=D   N server-sent events, one each D
//	GET  /sleep?for=D       an answer after D
//	GET  /status?code=N     an empty answer with that status
//
// On port 8081 it does the same for connections that begin with a PROXY header, and takes the other end of
// the socket from there. Port 8443 has the same by TLS.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"html/template"
	"io"
	"log"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/coder/websocket"
	"github.com/pires/go-proxyproto"
)

//go:embed page.html
var pageText string

var page = template.Must(template.New("page").Parse(pageText))

// facts are what the site knows about a request.
type facts struct {
	Client    string      `json:"client"` // the visitor's address, as the last proxy says
	Forwarded string      `json:"forwarded"`
	XFF       string      `json:"x_forwarded_for"`
	Proto     string      `json:"proto"`
	Peer      string      `json:"peer"` // the other end of the socket
	Local     string      `json:"local"`
	Host      string      `json:"host"`
	Path      string      `json:"path_id"` // the id that all hops share
	Container string      `json:"container"`
	Cloud     string      `json:"cloud"` // a line fetched from the cloud's API just now
	CloudSaw  string      `json:"cloud_saw"`
	Method    string      `json:"method"`
	URL       string      `json:"url"`
	HTTP      string      `json:"http"`
	Header    http.Header `json:"header"`
}

func main() {
	addr := ":8080"
	if a := os.Getenv("LISTEN"); a != "" {
		addr = a
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", home)
	mux.HandleFunc("/headers", func(w http.ResponseWriter, r *http.Request) { writeJSON(w, observe(r)) })
	mux.HandleFunc("GET /bytes", bytes)
	mux.HandleFunc("POST /upload", upload)
	mux.HandleFunc("POST /echo", echo)
	mux.HandleFunc("GET /ws", ws)
	mux.HandleFunc("GET /sse", sse)
	mux.HandleFunc("GET /sleep", func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-time.After(duration(r, "for", time.Second)):
			fmt.Fprintln(w, "good morning")
		case <-r.Context().Done():
		}
	})
	mux.HandleFunc("/status", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(int(number(r, "code", 200))) })
	go func() { // PID 1 of a container gets no signal that it does not ask for, and docker would wait 10 s
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGTERM)
		<-c
		os.Exit(0)
	}()
	go serveProxied(mux)
	go serveTLS(mux)
	log.Printf("blog: listening on %s", addr)
	log.Fatal(http.ListenAndServe(addr, mux))
}

func serveProxied(h http.Handler) {
	ln, err := net.Listen("tcp", ":8081")
	if err != nil {
		log.Printf("blog: %v", err)
		return
	}
	require := func(proxyproto.ConnPolicyOptions) (proxyproto.Policy, error) { return proxyproto.REQUIRE, nil }
	log.Fatal(http.Serve(&proxyproto.Listener{Listener: ln, ConnPolicy: require}, h))
}

// serveTLS serves the same on port 8443, with a certificate of the container's name that it has made itself.
func serveTLS(h http.Handler) {
	ln, err := net.Listen("tcp", ":8443")
	if err != nil {
		log.Printf("blog: %v", err)
		return
	}
	name, _ := os.Hostname()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		log.Fatal(err)
	}
	cert := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		log.Fatal(err)
	}
	s := &http.Server{Handler: h, TLSConfig: &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}}
	log.Fatal(s.ServeTLS(ln, "", ""))
}

func observe(r *http.Request) facts {
	f := facts{
		Forwarded: r.Header.Get("Forwarded"), XFF: r.Header.Get("X-Forwarded-For"), Proto: r.Header.Get("X-Forwarded-Proto"),
		Peer: r.RemoteAddr, Local: fmt.Sprint(r.Context().Value(http.LocalAddrContextKey)),
		Host: r.Host, Path: pathID(r.Header), Method: r.Method, URL: r.URL.String(), HTTP: r.Proto, Header: r.Header,
	}
	f.Container, _ = os.Hostname()
	f.Client, _, _ = strings.Cut(f.XFF, ",")
	if f.Client == "" {
		f.Client, _, _ = net.SplitHostPort(r.RemoteAddr)
	}
	return f
}

// pathID is the id that the hops gave the request.
func pathID(h http.Header) string {
	for _, name := range []string{"Tailsplice-Id", "Tailsplice-Path", "X-Tailsplice-Id", "X-Request-Id"} {
		if v := h.Get(name); v != "" {
			return v
		}
	}
	return ""
}

func home(w http.ResponseWriter, r *http.Request) {
	f := observe(r)
	f.Cloud, f.CloudSaw = cloud(r.Context())
	log.Printf("blog: %s for %s from %s", r.Host, f.Client, r.RemoteAddr)
	if strings.Contains(r.Header.Get("Accept"), "application/json") {
		writeJSON(w, f)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	if err := page.Execute(w, f); err != nil {
		log.Printf("blog: %v", err)
	}
}

// cloud asks the API in the cloud, which is what this site is for.
func cloud(ctx context.Context) (line, saw string) {
	u := os.Getenv("CLOUD")
	if u == "" {
		return "no cloud is configured", ""
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", u, nil)
	if err != nil {
		return err.Error(), ""
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return "the cloud does not answer: " + err.Error(), ""
	}
	defer res.Body.Close()
	var a struct{ Line, From string }
	if err := json.NewDecoder(res.Body).Decode(&a); err != nil {
		return "the cloud talks nonsense: " + err.Error(), ""
	}
	return a.Line, a.From
}

// bytes writes n bytes of a ChaCha8 stream, whose sum the client knows or finds in the trailer.
func bytes(w http.ResponseWriter, r *http.Request) {
	n := number(r, "n", 1<<20)
	var seed [32]byte
	copy(seed[:], r.FormValue("seed"))
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Trailer", "X-Sha256")
	sum := sha256.New()
	if _, err := io.CopyN(io.MultiWriter(w, sum), mathrand.NewChaCha8(seed), n); err != nil {
		panic(http.ErrAbortHandler) // the client must see that it isn't whole
	}
	w.Header().Set("X-Sha256", hexSum(sum))
}

func upload(w http.ResponseWriter, r *http.Request) {
	sum := sha256.New()
	n, err := io.Copy(sum, r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	writeJSON(w, map[string]any{"sha256": hexSum(sum), "bytes": n})
}

// echo answers while it still reads.
func echo(w http.ResponseWriter, r *http.Request) {
	rc := http.NewResponseController(w)
	rc.EnableFullDuplex()
	buf := make([]byte, 64<<10)
	for {
		n, err := r.Body.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return
			}
			rc.Flush()
		}
		if err == io.EOF {
			return
		}
		if err != nil {
			panic(http.ErrAbortHandler)
		}
	}
}

func ws(w http.ResponseWriter, r *http.Request) {
	c, err := websocket.Accept(w, r, nil)
	if err != nil {
		return
	}
	defer c.CloseNow()
	c.SetReadLimit(64 << 20)
	for {
		kind, data, err := c.Read(r.Context())
		if err != nil {
			return
		}
		if err := c.Write(r.Context(), kind, data); err != nil {
			return
		}
	}
}

func sse(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	rc := http.NewResponseController(w)
	every := duration(r, "every", 100*time.Millisecond)
	for i := range number(r, "n", 10) {
		fmt.Fprintf(w, "id: %d\ndata: %d\n\n", i, time.Now().UnixMilli())
		if rc.Flush() != nil {
			return
		}
		select {
		case <-time.After(every):
		case <-r.Context().Done():
			return
		}
	}
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.Encode(v)
}

func hexSum(h hash.Hash) string { return hex.EncodeToString(h.Sum(nil)) }

func number(r *http.Request, name string, otherwise int64) int64 {
	n, err := strconv.ParseInt(r.FormValue(name), 10, 64)
	if err != nil || n < 0 {
		return otherwise
	}
	return n
}

func duration(r *http.Request, name string, otherwise time.Duration) time.Duration {
	d, err := time.ParseDuration(r.FormValue(name))
	if err != nil || d < 0 {
		return otherwise
	}
	return d
}
