// Command edge is the first process of deploy/fly's image: it starts tailscaled, joins the tailnet, and
// starts tailsplice, again where that crashes. It ends with tailscaled, or when tailsplice crashes too often,
// so that fly.io starts the machine anew. TERM and INT drain.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"strings"
	"syscall"
	"time"
)

const (
	bin    = "/usr/bin/"
	config = "/etc/tailsplice/tailsplice.yaml"
	flyAPI = "/.fly/api" // a socket in each machine of fly.io
	secret = "/run/edge-secret"

	tailscaledSocket = "/run/tailscale/tailscaled.sock"
	grace            = 10 * time.Second // for tailscaled's end
)

const crashPause = 100 * time.Millisecond

// tailsplice is started again unless it has failed to start so many times in a row, or crashes so many times
// in a while. Else it goes on: what is kept of flows and connections ends with this process.
const (
	mostFailed  = 5
	mostCrashes = 30
	crashesIn   = time.Minute
)

// crashes counts them.
type crashes struct {
	failed int // in a row that never served
	at     []time.Time
}

// tooOften counts a crash, and reports whether tailsplice is not to be started again.
func (c *crashes) tooOften(now time.Time, served bool) bool {
	if c.failed++; served {
		c.failed = 0
	}
	c.at = append(c.at, now)
	c.at = c.at[max(0, len(c.at)-mostCrashes-1):]
	return c.failed > mostFailed || len(c.at) > mostCrashes && now.Sub(c.at[0]) < crashesIn
}

func main() {
	log.SetFlags(0)
	log.SetPrefix("edge: ")
	if len(os.Args) > 2 && os.Args[1] == "exec" {
		log.Fatal(execute(os.Args[2:]))
	}
	if err := run(); err != nil {
		log.Fatal(err)
	}
}

// run returns nil when it was told to end, and all have ended well.
func run() error {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	drain, err := time.ParseDuration(env("DRAIN_TIMEOUT", "290s"))
	if err != nil {
		return fmt.Errorf("DRAIN_TIMEOUT: %w: 290s, for instance", err)
	}
	if text, err := os.ReadFile("/etc/tailsplice/fly.toml"); err == nil {
		if kill := killTimeout(string(text)); drain >= kill {
			log.Printf("warning: DRAIN_TIMEOUT is %v, but fly.io kills this machine after kill_timeout, which is %v, and "+
				"with it all open connections; raise kill_timeout (to 300 at most), or lower DRAIN_TIMEOUT", drain, kill)
		}
	}
	for _, dir := range []string{"/run/tailscale", "/run/tailsplice", "/var/run", "/tmp", "/var/lib/tailscale"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	memory := "GOMEMLIMIT=" + env("TAILSCALED_GOMEMLIMIT", "100MiB")
	tailscaled, err := start("tailscaled", nil, []string{memory}, "--state=mem:",
		"--socket="+tailscaledSocket,
		"--tun=tailscale0", "--port=41641")
	if err != nil {
		return err
	}
	defer tailscaled.end(grace)
	joined := make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() { joined <- join(ctx) }()
	select {
	case err := <-joined:
		if err != nil {
			return err
		}
	case <-tailscaled.done:
		return fmt.Errorf("tailscaled ended: %v", tailscaled.err)
	case s := <-signals:
		return fmt.Errorf("%v, before it was in the tailnet", s)
	}
	keeper, err := newKeeper("/run/tailsplice")
	if err != nil {
		return err
	}
	begin := func() (*process, error) {
		environ, files := keeper.environ()
		environ = append(environ, "TAILSPLICE_TAILSCALED_SOCKET="+tailscaledSocket)
		return start("tailsplice", files, environ, "run", "--config", config,
			"--drain-timeout", drain.String())
	}
	tailsplice, err := begin()
	if err != nil {
		return err
	}
	known := processes{tailsplice.Pid: tailsplice}
	look := time.NewTicker(time.Second)
	defer look.Stop()
	var crashed crashes
	var zombies map[int]bool
	for told := false; ; {
		select {
		case <-tailsplice.done:
			time.Sleep(crashPause) // what it has said at last is heard by then
			select {
			case pid := <-keeper.main: // another process has taken over, and nothing was left here
				if pid != tailsplice.Pid {
					tailsplice = known.follow(pid)
					continue
				}
			default:
			}
			if tailsplice.err == nil { // it was told to end, or by drain --all --end
				return nil
			}
			if told || crashed.tooOften(time.Now(), keeper.heard()) {
				return fmt.Errorf("tailsplice ended: %v", tailsplice.err)
			}
			log.Printf("tailsplice ended: %v; it is started again", tailsplice.err)
			endAll("tailsplice") // one that had begun to take over would accept beside the next one
			keeper.forgetMain()
			if tailsplice, err = begin(); err != nil {
				return err
			}
			known = processes{tailsplice.Pid: tailsplice}
		case pid := <-keeper.main:
			tailsplice = known.follow(pid)
		case <-look.C:
			zombies = reap(zombies)
			if keeper.hangs() && !told {
				log.Print("tailsplice does not say that it serves, and is ended")
				tailsplice.abort()
			}
		case <-tailscaled.done:
			tailsplice.end(grace) // its flows go by the tailnet: nothing is left to wait for
			return fmt.Errorf("tailscaled ended: %v", tailscaled.err)
		case s := <-signals:
			told = true
			tailsplice.Signal(s)
			keeper.drop()
		}
	}
}

func env(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

// process is a child.
type process struct {
	*os.Process
	done chan struct{} // closed at its end
	err  error         // then
}

// start starts a program, which gets files as its descriptors from 3 on.
func start(name string, files []*os.File, environ []string, args ...string) (*process, error) {
	cmd := exec.Command(bin+name, args...)
	if len(files) > 0 {
		cmd = exec.Command("/proc/self/exe", append([]string{"exec", bin + name}, args...)...)
	}
	cmd.Env = append(withoutSecrets(os.Environ()), environ...)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = os.Stdout, os.Stderr, files
	// Signals of a terminal come to this process alone, and it dies with nothing left behind.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return await(cmd.Process, cmd.Wait), nil
}

// processes are those of tailsplice that are waited for, by PID.
type processes map[int]*process

// follow waits for a child that another one has started here. One that is known is waited for already.
func (all processes) follow(pid int) *process {
	if p := all[pid]; p != nil {
		return p
	}
	p, _ := os.FindProcess(pid) // which does not fail
	all[pid] = await(p, func() error {
		state, err := p.Wait()
		if err == nil && !state.Success() {
			err = errors.New(state.String())
		}
		return err
	})
	return all[pid]
}

func await(p *os.Process, wait func() error) *process {
	all := &process{Process: p, done: make(chan struct{})}
	go func() { all.err = wait(); close(all.done) }()
	return all
}

// end asks a process to end, makes it, and waits.
func (p *process) end(after time.Duration) { p.endBy(syscall.SIGTERM, after) }

// abort has a process write what its goroutines do, and waits for its end.
func (p *process) abort() {
	p.Signal(syscall.SIGCONT)
	p.endBy(syscall.SIGABRT, abortFor)
}

func (p *process) endBy(s os.Signal, after time.Duration) {
	p.Signal(s)
	select {
	case <-p.done:
	case <-time.After(after):
		p.Kill()
		<-p.done
	}
}

func withoutSecrets(all []string) (rest []string) {
	for _, v := range all {
		if !strings.HasPrefix(v, "TS_AUTHKEY=") {
			rest = append(rest, v)
		}
	}
	return rest
}

// join brings this machine into the tailnet, as an ephemeral node with tags: by an auth key, or by the
// identity that fly.io vouches for.
func join(ctx context.Context) error {
	args := []string{"--socket=" + tailscaledSocket, "up",
		"--hostname=" + env("TS_HOSTNAME", "edge-"+env("FLY_REGION", "lab")),
		"--netfilter-mode=off", "--accept-dns=false", "--advertise-tags=" + env("TS_TAGS", "tag:edge")}
	if server := os.Getenv("TS_LOGIN_SERVER"); server != "" {
		args = append(args, "--login-server="+server)
	}
	key, id := os.Getenv("TS_AUTHKEY"), os.Getenv("TS_CLIENT_ID")
	switch {
	case key != "":
		args = append(args, "--auth-key=file:"+secret)
	case id != "":
		var err error
		if key, err = idToken(ctx, env("TS_AUDIENCE", "api.tailscale.com/"+id)); err != nil {
			return err
		}
		args = append(args, "--client-id="+id+"?ephemeral=true&preauthorized=true", "--id-token=file:"+secret)
	default:
		return errors.New("neither TS_AUTHKEY nor TS_CLIENT_ID is set: see docs/fly.md, step 5")
	}
	if err := os.WriteFile(secret, []byte(key), 0o600); err != nil {
		return err
	}
	defer os.Remove(secret)
	for try := 1; ; try++ {
		up := exec.CommandContext(ctx, bin+"tailscaled", args...)
		up.Env = append(withoutSecrets(os.Environ()), "TS_BE_CLI=1")
		out, err := up.CombinedOutput()
		if err == nil || ctx.Err() != nil {
			return ctx.Err()
		}
		// tailscaled's socket may not be there yet.
		log.Printf("tailscale up: %v: %s", err, bytes.TrimSpace(out))
		if try == 10 {
			return errors.New("not in the tailnet after 10 tries: see above")
		}
		time.Sleep(time.Duration(try) * time.Second / 2)
	}
}

// idToken asks the machine's own API for a token (OpenID Connect) that says which app and machine this is.
func idToken(ctx context.Context, audience string) (string, error) {
	api := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", env("FLY_API_SOCKET", flyAPI))
		}}}
	body := fmt.Sprintf(`{"aud": %q}`, audience)
	req, err := http.NewRequestWithContext(ctx, "POST", "http://localhost/v1/tokens/oidc", strings.NewReader(body))
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := api.Do(req)
	if err != nil {
		return "", fmt.Errorf("ask fly.io who this machine is: %w", err)
	}
	defer res.Body.Close()
	token, err := io.ReadAll(io.LimitReader(res.Body, 64<<10))
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", res.Status, token)
	}
	if err != nil {
		return "", fmt.Errorf("ask fly.io who this machine is: %w", err)
	}
	return string(bytes.TrimSpace(token)), nil
}

var killLine = regexp.MustCompile(`(?m)^\s*kill_timeout\s*=\s*"?(\d+)(s|m)?"?`)

// killTimeout is how long fly.io waits after the first signal, by an app's fly.toml.
func killTimeout(flyToml string) time.Duration {
	m := killLine.FindStringSubmatch(flyToml)
	if m == nil {
		return 5 * time.Second
	}
	if m[2] == "" {
		m[2] = "s"
	}
	d, err := time.ParseDuration(m[1] + m[2])
	if err != nil {
		return 5 * time.Second
	}
	return d
}
