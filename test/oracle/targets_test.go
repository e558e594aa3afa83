//lint:file-ignore SA1019 only the deprecated h2c takes Upgrade: h2c, and that a client can't reach it so is to be tried
package oracle

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/h2c"
)

// A target is a real server that the daemon forwards to. By its own reading of host and path it says of what
// is guarded that it is, with a word that no client knows, and which guard it should have been.
type target struct {
	name, socket string
	h2c          bool // it is spoken to in HTTP/2
}

// kinds are the guards: each has a host and a path of open.test. At policy.test the auth server decides by
// the host.
var (
	kinds = []string{"allow", "basic", "forward", "cert"}
	hosts = append([]string{"policy"}, kinds...)
)

// startTargets starts all servers that there are. Their answers are the word of what is guarded, or "open".
func startTargets(t testing.TB, dir, word string) []target {
	in := func(name string) string { return filepath.Join(dir, name+".sock") }
	startGo(t, in("go"), word)
	startSCGI(t, in("scgi"), word)
	startNginx(t, dir, in, word)
	startHAProxy(t, dir, in, word)
	startLighttpd(t, dir, in)
	targets := []target{
		{"go", in("go"), false}, {"go-h2c", in("go"), true}, {"nginx", in("nginx"), false}, {"nginx-again",
			in("again"), false},
		{"haproxy", in("haproxy"), false}, {"lighttpd", in("lighttpd"), false},
	}
	if startCaddy(t, dir, in("caddy"), word) {
		targets = append(targets, target{"caddy", in("caddy"), false})
	}
	for _, target := range targets {
		waitFor(t, target.name, func() error {
			c, err := net.Dial("unix", target.socket)
			if err == nil {
				c.Close()
			}
			return err
		})
	}
	return targets
}

// waitFor waits until try succeeds.
func waitFor(t testing.TB, what string, try func() error) {
	t.Helper()
	err := try()
	for deadline := time.Now().Add(time.Minute); err != nil && time.Now().Before(deadline); err = try() {
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// guardedKind says which guard host and path have, as the configuration of the daemon has it; "" for none.
func guardedKind(host, p string) string {
	below := func(prefix string) bool { return p == prefix || strings.HasPrefix(p, prefix+"/") }
	for _, kind := range hosts {
		if host == kind+".test" || host == "open.test" && below("/"+kind) && kind != "policy" {
			return kind
		}
	}
	switch {
	case host == "stripped.test" && below("/private"): // strip_prefix made it of /app/private
		return "private"
	case host == "below.test" && !below("/below"): // add_prefix is to keep everything there
		return "below"
	}
	return ""
}

// judge is what an application says that believes these.
func judge(word, host, p string) string {
	if kind := guardedKind(plainHost(host), p); kind != "" && p != "" {
		return word + ":" + kind + " "
	}
	return ""
}

// checkTold compares what the auth server was told with what a target saw.
func checkTold(word, told, host, uri string) string {
	if told == "" {
		return ""
	}
	toldHost, toldURI, _ := strings.Cut(told, " ")
	same := toldURI == uri
	if strings.HasPrefix(uri, "//") { // what no URI may have is escaped there
		same = unescaped(toldURI) == unescaped(uri)
	}
	if !same || plainHost(toldHost) != plainHost(host) {
		return fmt.Sprintf("%s:told %q, saw %q ", word, told, host+" "+uri)
	}
	return ""
}

// plainHost is a host without its port, of which some servers take off the usual one, in lower case.
func plainHost(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	return strings.TrimSuffix(strings.ToLower(host), ".")
}

func unescaped(p string) string {
	p, _, _ = strings.Cut(p, "?")
	p, _ = url.PathUnescape(p)
	return p
}

// startGo starts net/http's server and its ServeMux, that speaks HTTP/2 too, by whatever way a client likes.
func startGo(t testing.TB, socket, word string) {
	var mux http.ServeMux
	guarded := func(kind string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "%s:%s %q %q", word, kind,
				r.Host, r.RequestURI)
		}
	}
	for _, kind := range hosts {
		mux.HandleFunc(kind+".test/", guarded(kind))
	}
	for _, kind := range kinds {
		mux.HandleFunc("open.test/"+kind, guarded(kind))
		mux.HandleFunc("open.test/"+kind+"/", guarded(kind))
	}
	mux.HandleFunc("stripped.test/private", guarded("private"))
	mux.HandleFunc("stripped.test/private/", guarded("private"))
	mux.HandleFunc("below.test/", guarded("below"))
	open := func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, checkTold(word, r.Header.Get("X-Told"), r.Host, r.RequestURI), "open")
		fmt.Fprint(w, judge(word, r.Host, r.URL.Path)) // as it is, without the mux's redirects
	}
	mux.HandleFunc("below.test/below/", open)
	mux.HandleFunc("below.test/below", open)
	mux.HandleFunc("/", open)
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	serve(t, socket, &http.Server{Protocols: &protocols, Handler: h2c.NewHandler(&mux, &http2.Server{}),
		ErrorLog: quiet})
}

func serve(t testing.TB, socket string, srv *http.Server) {
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
}

// startSCGI starts an application that gets the variables of CGI, as lighttpd and nginx make them.
func startSCGI(t testing.TB, socket, word string) {
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	serveEach(t, ln, func(c net.Conn) {
		c.SetDeadline(time.Now().Add(time.Minute))
		br := bufio.NewReader(c)
		vars, err := readSCGI(br)
		if err != nil {
			return
		}
		n, _ := strconv.Atoi(vars["CONTENT_LENGTH"])
		io.CopyN(io.Discard, br, int64(n))
		body := judgeVariables(word, vars) + "open"
		fmt.Fprintf(c, "Status: 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%s",
			len(body), body)
	})
}

// serveEach has serve talk to each connection that comes, until the end of the test.
func serveEach(t testing.TB, ln net.Listener, serve func(net.Conn)) {
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				serve(c)
			}()
		}
	}()
}

// readSCGI reads the variables of a request: a netstring of names and values that end in zeros.
func readSCGI(br *bufio.Reader) (map[string]string, error) {
	size, err := br.ReadString(':')
	if err != nil {
		return nil, err
	}
	n, err := strconv.Atoi(strings.TrimSuffix(size, ":"))
	if err != nil {
		return nil, err
	}
	block := make([]byte, n+1) // a comma ends it
	if _, err := io.ReadFull(br, block); err != nil {
		return nil, err
	}
	vars, parts := map[string]string{}, strings.Split(string(block[:n]), "\x00")
	for i := 0; i+1 < len(parts); i += 2 {
		vars[parts[i]] = parts[i+1]
	}
	return vars, nil
}

// judgeVariables is what an application says that believes the variables of CGI.
func judgeVariables(word string, vars map[string]string) (said string) {
	uri := vars["REQUEST_URI"]
	raw, _, _ := strings.Cut(uri, "?")
	plain, _ := url.PathUnescape(raw)
	for _, host := range []string{vars["HTTP_HOST"], vars["SERVER_NAME"]} {
		for _, p := range []string{vars["DOCUMENT_URI"], vars["SCRIPT_NAME"] + vars["PATH_INFO"], plain,
			path.Clean("/" + plain)} {
			said += judge(word, host, p)
		}
	}
	said += checkTold(word, vars["HTTP_X_TOLD"], vars["HTTP_HOST"], uri)
	for _, name := range identities {
		// What is asked for may be called forged.
		if v := vars[cgiName(name)]; strings.Contains(v, forged) && v != vars["HTTP_HOST"] {
			said += fmt.Sprintf("%s:forged %s=%q ", word, cgiName(name), v)
		}
	}
	if v := vars["HTTP_X_FORWARDED_FOR"]; v != "127.0.0.1" {
		said += fmt.Sprintf("%s:from %q ", word, v)
	}
	return said
}

func cgiName(header string) string {
	return "HTTP_" + strings.ToUpper(strings.ReplaceAll(header, "-", "_"))
}

// identities are headers in which applications find who it is. A stranger says that it is forged.
var identities = []string{"Tailscale-User-Login", "X-Forwarded-For", "X-Forwarded-User", "X-Forwarded-Host",
	"X-Real-Ip", "X-Told", "Client-Cert"}

const forged = "forged"

// A process is a server that was started.
type process struct {
	mu  sync.Mutex
	out strings.Builder // what it has written, up to a bound
}

func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.out.Len() < 1<<20 {
		p.out.Write(b)
	}
	return len(b), nil
}

// said is what it has written from a byte on.
func (p *process) said(from int) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()[from:]
}

// command starts a server, which ends when this process does. If the test fails, it shows what that wrote.
func command(t testing.TB, env []string, name string, args ...string) *process {
	t.Helper()
	p := &process{}
	// The shell stops the server when its input ends, which it does however this process ends.
	cmd := exec.Command("sh", append([]string{"-c", `"$0" "$@" </dev/null & read _; kill $!; wait`,
		lookPath(t, name)},
		args...)...)
	cmd.Env = append(os.Environ(), env...)
	input, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = p, p
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		input.Close()
		cmd.Wait()
		if said := p.said(0); t.Failed() && said != "" {
			t.Logf("%s says: %.4000s", name, said)
		}
	})
	return p
}

func lookPath(t testing.TB, name string) string {
	t.Helper()
	for _, file := range []string{name, "/usr/sbin/" + name} { // sbin is not in everyone's PATH
		if p, err := exec.LookPath(file); err == nil {
			return p
		}
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("%s is not installed", name)
	}
	t.Skipf("this machine lacks %s", name)
	return ""
}

func write(t testing.TB, file, text string) string {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// startNginx starts nginx twice: as it is mostly used, and as one that sends its decoded $uri on to Go.
func startNginx(t testing.TB, dir string, in func(string) string, word string) {
	var b strings.Builder
	location := func(p, kind string) {
		fmt.Fprintf(&b, "location = %s { return 200 %s:%s; }\nlocation ^~ %s/ { return 200 %s:%s; }\n", p,
			word, kind, p, word, kind)
	}
	server := func(name, flags string, inner func()) {
		fmt.Fprintf(&b, "server { listen unix:%s %s; server_name %s;\n", in("nginx"), flags, name)
		inner()
		b.WriteString("}\n")
	}
	open := func() {
		fmt.Fprintf(&b, "location / { include /etc/nginx/scgi_params; scgi_pass unix:%s; }\n",
			in("scgi"))
	}
	server("_", "default_server", open)
	for _, kind := range hosts {
		server(kind+".test", "", func() { fmt.Fprintf(&b, "location / { return 200 %s:%s; }\n", word, kind) })
	}
	server("open.test", "", func() {
		open()
		for _, kind := range kinds {
			location("/"+kind, kind)
		}
	})
	server("stripped.test", "", func() { open(); location("/private", "private") })
	server("below.test", "", func() {
		fmt.Fprintf(&b, "location / { return 200 %s:below; }\nlocation = /below { return 200 open; }\nlocation /below/ { return 200 open; }\n", word)
	})
	conf := write(t, filepath.Join(dir, "nginx.conf"), fmt.Sprintf(`
daemon off; master_process off; pid %[1]s/nginx.pid; error_log stderr crit;
events { worker_connections 4096; }
http {
	access_log off; keepalive_requests 1000000; default_type text/plain; root %[1]s/none;
	client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/fastcgi; uwsgi_temp_path %[1]s/uwsgi; scgi_temp_path %[1]s/scgi;
	upstream go { server unix:%[2]s; keepalive 16; }
	server {
		listen unix:%[3]s;
		location / { proxy_pass http://go$uri; proxy_http_version 1.1; proxy_set_header Host $http_host; proxy_set_header Connection ""; proxy_set_header X-Told ""; }
	}
%[4]s}
`, dir, in("go"), in("again"), &b))
	command(t, nil, "nginx", "-c", conf, "-p", dir, "-e", "stderr")
}

// startHAProxy starts HAProxy, which answers for what is guarded and has Go behind it for the rest.
func startHAProxy(t testing.TB, dir string, in func(string) string, word string) {
	var b strings.Builder
	rule := func(kind, condition string) {
		fmt.Fprintf(&b, "\thttp-request return status 200 content-type text/plain string %s:%s if %s\n",
			word, kind, condition)
	}
	host := func(h string) string { return "{ req.hdr(host),host_only,lower -m str " + h + " }" }
	for _, kind := range hosts {
		rule(kind, host(kind+".test"))
	}
	for _, kind := range kinds {
		rule(kind, host("open.test")+fmt.Sprintf(" { path -m str /%[1]s } || %[2]s { path -m beg /%[1]s/ } || %[2]s { path,url_dec -m str /%[1]s } || %[2]s { path,url_dec -m beg /%[1]s/ }", kind, host("open.test")))
	}
	rule("private", host("stripped.test")+" { path -m reg ^/private(/|$) }")
	rule("below", host("below.test")+" !{ path -m reg ^/below(/|$) }")
	conf := write(t, filepath.Join(dir, "haproxy.cfg"), fmt.Sprintf(`
global
	nbthread 1
	maxconn 2000
defaults
	mode http
	timeout connect 1m
	timeout client 1m
	timeout server 1m
	http-reuse always
frontend web
	bind unix@%s
%s	default_backend go
backend go
	server go unix@%s
`, in("haproxy"), &b, in("go")))
	command(t, nil, "haproxy", "-db", "-f", conf)
}

// startLighttpd starts lighttpd with an application by SCGI, whose variables are those of its CGI.
func startLighttpd(t testing.TB, dir string, in func(string) string) {
	conf := write(t, filepath.Join(dir, "lighttpd.conf"), fmt.Sprintf(`
server.document-root = "%[1]s"
server.bind = "%[2]s"
server.modules = ("mod_scgi")
server.max-keep-alive-requests = 0
server.errorlog = "/dev/null"
scgi.server = ("/" => (("socket" => "%[3]s", "check-local" => "disable", "fix-root-scriptname" => "enable")))
`, dir, in("lighttpd"), in("scgi")))
	command(t, nil, "lighttpd", "-D", "-f", conf)
}

// startCaddy starts Caddy where `make bench` has built it.
func startCaddy(t testing.TB, dir, socket, word string) bool {
	cache, err := os.UserCacheDir()
	if err != nil {
		return false
	}
	built, _ := filepath.Glob(filepath.Join(cache, "tailsplice", "caddy-*"))
	if len(built) == 0 {
		t.Log("no Caddy, which make bench builds: it is left out")
		return false
	}
	slices.Sort(built)
	var b strings.Builder
	fmt.Fprintf(&b, "{\n\tadmin off\n\tauto_https off\n\tpersist_config off\n\tlog {\n\t\tlevel FATAL\n\t}\n}\n")
	site := func(host, inner string) {
		fmt.Fprintf(&b, "http://%s {\n\tbind unix/%s\n%s}\n", host, socket,
			inner)
	}
	open := "\trespond open\n"
	for _, kind := range hosts {
		site(kind+".test", fmt.Sprintf("\trespond %s:%s\n", word, kind))
	}
	inner := ""
	for _, kind := range kinds {
		inner += fmt.Sprintf("\trespond /%[1]s %[2]s:%[1]s\n\trespond /%[1]s/* %[2]s:%[1]s\n", kind, word)
	}
	site("open.test", inner+open)
	site("stripped.test",
		fmt.Sprintf("\trespond /private %[1]s:private\n\trespond /private/* %[1]s:private\n", word)+open)
	site("below.test", fmt.Sprintf("\trespond /below open\n\trespond /below/* open\n\trespond %s:below\n",
		word))
	site("", open)
	conf := write(t, filepath.Join(dir, "Caddyfile"), b.String())
	command(t, []string{"XDG_DATA_HOME=" + dir, "XDG_CONFIG_HOME=" + dir}, built[len(built)-1], "run",
		"--config", conf, "--adapter", "caddyfile")
	return true
}
