package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/tailsplice/tailsplice/test/netns/lab"
	"golang.org/x/sys/unix"
)

// keeperEnv tells a process that it is the keeper: it holds the world of KEEP=1 after its parent has returned
// to the shell. Its file 3 is where it says how the show went.
const keeperEnv = "TAILSPLICE_DEMO_KEEPER"

// keeperSocket is where the keeper takes commands.
const keeperSocket = "/run/tailsplice-lab/demo.sock"

// startKeeper runs the show in a process of its own, and returns when the show is over; the world stays.
func startKeeper() error {
	if os.Getenv(keeperEnv) != "" {
		return keeper()
	}
	if _, err := ask("GET", "/enter", nil); err == nil {
		return errors.New("a demo is up already: take it down first, with `build/demo down`")
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	pr, pw, err := os.Pipe()
	if err != nil {
		return err
	}
	defer pr.Close()
	c := exec.Command(exe)
	c.Env = append(os.Environ(), keeperEnv+"=1")
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	c.ExtraFiles = []*os.File{pw}
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // it stays when the terminal goes
	if err := c.Start(); err != nil {
		return err
	}
	pw.Close()
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, unix.SIGINT, unix.SIGTERM)
	go func() {
		for sig := range interrupted {
			c.Process.Signal(sig)
		}
	}()
	verdict, err := io.ReadAll(pr)
	switch {
	case err != nil:
		return err
	case string(verdict) == "ok":
		return nil
	case len(verdict) > 0:
		return errors.New(string(verdict))
	}
	return fmt.Errorf("the show was not finished: %w", c.Wait())
}

// keeper is the show and what comes after it.
func keeper() error {
	unix.CloseOnExec(3) // the daemons of the world must not hold it open
	result := os.NewFile(3, "result")
	return run(func(w *lab.World, showErr error) error {
		down := make(chan struct{})
		ln, err := serveCommands(w, down)
		if err != nil {
			return errors.Join(showErr, err)
		}
		defer ln.Close()
		if showErr != nil {
			fmt.Fprintf(result, "%v\n(the world is up: look around with `build/demo in HOST COMMAND`, end with `build/demo down`)", showErr)
		} else {
			printHelp()
			io.WriteString(result, "ok")
		}
		result.Close()
		if err := silence(); err != nil {
			return err
		}
		<-down
		return nil
	})
}

func printHelp() {
	fmt.Print(`The world stays up. As root, for example:

  build/demo in client curl -i https://example.vsq.cz/     # any host: client edge-a edge-b home laptop cloud inet nat
  build/demo in edge-a build/tailsplice status             # also: flows --json; the log is in $HOME/../log
  build/demo in laptop ip -br address
  build/demo prefer edge-b                                 # by BGP; no edge is cut off
  build/demo cut edge-a; build/demo restore edge-a         # or blackhole: silently
  build/demo roam hotspot                                  # the laptop changes networks; wifi leads back
  build/demo down                                          # take it all down

`)
}

// silence lets go of the terminal.
func silence() error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	for fd := range 3 {
		if err := unix.Dup2(int(null.Fd()), fd); err != nil {
			return err
		}
	}
	return nil
}

// serveCommands takes the commands of control. down is closed when one of them is to end.
func serveCommands(w *lab.World, down chan<- struct{}) (net.Listener, error) {
	os.Remove(keeperSocket) // of a dead one: startKeeper has asked
	ln, err := net.Listen("unix", keeperSocket)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(keeperSocket, 0o600); err != nil {
		ln.Close()
		return nil, err
	}
	mux := http.NewServeMux()
	onHost := func(pattern string, f func(r *http.Request, h *lab.Host) error) {
		mux.HandleFunc(pattern, func(rw http.ResponseWriter, r *http.Request) {
			h := w.Host(r.FormValue("host"))
			if h == nil {
				http.Error(rw, fmt.Sprintf("no host %q", r.FormValue("host")), http.StatusNotFound)
				return
			}
			if err := f(r, h); err != nil {
				http.Error(rw, err.Error(), http.StatusConflict)
			}
		})
	}
	onHost("POST /prefer", func(r *http.Request, h *lab.Host) error {
		if h != w.EdgeA && h != w.EdgeB {
			return fmt.Errorf("%s is no edge", h.Name)
		}
		return w.Prefer(r.Context(), h)
	})
	onHost("POST /cut", func(_ *http.Request, h *lab.Host) error { return h.Cut(false) })
	onHost("POST /blackhole", func(_ *http.Request, h *lab.Host) error { return h.Cut(true) })
	onHost("POST /restore", func(_ *http.Request, h *lab.Host) error { return h.Restore() })
	mux.HandleFunc("POST /roam", func(rw http.ResponseWriter, r *http.Request) {
		if err := w.Laptop.Roam(r.FormValue("host")); err != nil {
			http.Error(rw, err.Error(), http.StatusConflict)
		}
	})
	mux.HandleFunc("GET /enter", func(rw http.ResponseWriter, r *http.Request) {
		if h := w.Host(r.FormValue("host")); h != nil {
			io.WriteString(rw, strings.Join(h.Enter(), "\n"))
		} else if name := r.FormValue("host"); name != "" {
			http.Error(rw, fmt.Sprintf("no host %q", name), http.StatusNotFound)
		}
	})
	mux.HandleFunc("GET /files", func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, w.Dir) })
	mux.HandleFunc("POST /down", func(http.ResponseWriter, *http.Request) { close(down) })
	go (&http.Server{Handler: mux, ErrorLog: log.New(io.Discard, "", 0)}).Serve(ln)
	return ln, nil
}

// ask sends a command to the keeper.
func ask(method, path string, form url.Values) (string, error) {
	var d net.Dialer
	c := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return d.DialContext(ctx, "unix", keeperSocket)
	}}}
	req, err := http.NewRequest(method, "http://demo"+path+"?"+form.Encode(), nil)
	if err != nil {
		return "", err
	}
	res, err := c.Do(req)
	if err != nil {
		return "", fmt.Errorf("no demo is up (`make demo KEEP=1` leaves one up): %w", err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = errors.New(strings.TrimSpace(string(b)))
	}
	return string(b), err
}

// control is the command line for a world that is up.
func control(args []string) error {
	verb, args := args[0], args[1:]
	switch {
	case verb == "in" && len(args) >= 2:
		enter, err := ask("GET", "/enter", url.Values{"host": args[:1]})
		if err != nil {
			return err
		}
		return enterHost(strings.Split(enter, "\n"), args[1:])
	case (verb == "prefer" || verb == "cut" || verb == "blackhole" || verb == "restore" || verb == "roam") && len(args) == 1:
		_, err := ask("POST", "/"+verb, url.Values{"host": args})
		return err
	case verb == "down" && len(args) == 0:
		dir, err := ask("GET", "/files", nil)
		if err != nil {
			return err
		}
		if _, err := ask("POST", "/down", nil); err != nil {
			return err
		}
		for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
			if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
				return nil
			}
		}
		return fmt.Errorf("%s is still there after 20 s", dir)
	}
	return errors.New("usage: demo [in HOST COMMAND... | prefer EDGE | cut HOST | blackhole HOST | restore HOST | roam wifi|hotspot | down]")
}

// enterHost becomes the command on the host. A path that is relative to here is found there too.
func enterHost(enter, command []string) error {
	nsenter, err := exec.LookPath(enter[0])
	if err != nil {
		return err
	}
	if strings.Contains(command[0], "/") {
		if command[0], err = filepath.Abs(command[0]); err != nil {
			return err
		}
	}
	return unix.Exec(nsenter, append(enter, command...), os.Environ())
}
