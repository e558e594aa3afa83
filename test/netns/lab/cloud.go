package lab

import (
	"encoding/json"
	"fmt"
	"net/http"
	"sync/atomic"
)

// startCloud serves the API that the blog calls: what a laptop's container may need from somewhere else.
func (w *World) startCloud() error {
	ln, err := w.Cloud.Listen("tcp", ":80")
	if err != nil {
		return fmt.Errorf("cloud API: %w", err)
	}
	var calls atomic.Int64
	mux := http.NewServeMux()
	mux.HandleFunc("GET /hello", func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Content-Type", "application/json")
		json.NewEncoder(rw).Encode(map[string]any{
			"line": fmt.Sprintf("Hello from the cloud; this is call %d.", calls.Add(1)),
			"from": r.RemoteAddr, // the laptop's uplink, as it masquerades its containers
		})
	})
	s := &http.Server{Handler: mux}
	go s.Serve(ln)
	w.onClose(func() { s.Close() })
	return nil
}
