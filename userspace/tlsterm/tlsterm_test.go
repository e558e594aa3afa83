package tlsterm

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tailsplice/tailsplice/test/logs"
	"github.com/tailsplice/tailsplice/userspace/filestamp"
)

// TestLoadTeaches checks that each thing that is wrong with files is refused
// with the file's name and words that tell what to do.
func TestLoadTeaches(t *testing.T) {
	dir := t.TempDir()
	at := func(n string) string { return filepath.Join(dir, n) }
	good := mint(t, nil, []string{"example.org"})
	other := mint(t, nil, []string{"other.example.org"})
	expired := mint(t, nil, []string{"old.example.org"}, validFor(-48*time.Hour, -24*time.Hour))
	early := mint(t, nil, []string{"new.example.org"}, validFor(24*time.Hour, 48*time.Hour))
	root := mint(t, nil, nil, authority("Test Root"))
	deadCA := mint(t, root, nil, authority("Dead CA"), validFor(-48*time.Hour, -time.Hour))
	underDead := mint(t, deadCA, []string{"dead.example.org"})
	encrypted := []byte("-----BEGIN ENCRYPTED PRIVATE KEY-----\nMAA=\n-----END ENCRYPTED PRIVATE KEY-----\n")
	oldEncrypted := []byte("-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\nMAA=\n-----END RSA PRIVATE KEY-----\n")
	request := []byte("-----BEGIN CERTIFICATE REQUEST-----\nMAA=\n-----END CERTIFICATE REQUEST-----\n")
	cert, key := write(t, at("good.pem"), good.certPEM), write(t, at("good.key"), good.keyPEM)
	locked := write(t, at("locked.key"), good.keyPEM)
	os.Chmod(locked, 0)
	big := at("big.pem")
	if err := os.WriteFile(big, make([]byte, maxFile+1), 0o600); err != nil {
		t.Fatal(err)
	}

	for name, tc := range map[string]struct {
		spec Spec
		file string // that the error begins with
		want string
	}{
		"missing cert":         {Spec{Cert: at("none.pem"), Key: key}, at("none.pem"), "no such file"},
		"missing key":          {Spec{Cert: cert, Key: at("none.key")}, at("none.key"), "no such file"},
		"unreadable":           {Spec{Cert: cert, Key: locked}, locked, "no permission"},
		"directory":            {Spec{Cert: dir, Key: key}, dir, "is a directory"},
		"huge":                 {Spec{Cert: big, Key: key}, big, "more than any certificate"},
		"empty":                {Spec{Cert: write(t, at("empty.pem"), []byte(" \n")), Key: key}, at("empty.pem"), "is empty"},
		"not PEM":              {Spec{Cert: write(t, at("text.pem"), []byte("hello\n")), Key: key}, at("text.pem"), "not PEM"},
		"DER":                  {Spec{Cert: write(t, at("der.pem"), good.cert.Raw), Key: key}, at("der.pem"), "openssl x509 -inform DER"},
		"broken certificate":   {Spec{Cert: write(t, at("bad.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{0x30, 0}})), Key: key}, at("bad.pem"), "certificate 1 in it"},
		"swapped":              {Spec{Cert: key, Key: cert}, key, "swapped"},
		"certificate as key":   {Spec{Cert: cert, Key: cert}, cert, "no private key"},
		"request":              {Spec{Cert: write(t, at("csr.pem"), request), Key: key}, at("csr.pem"), "certificate request"},
		"mismatch":             {Spec{Cert: cert, Key: write(t, at("other.key"), other.keyPEM)}, at("other.key"), "does not match the certificate for example.org in " + cert},
		"leaf not first":       {Spec{Cert: write(t, at("order.pem"), root.certPEM, good.certPEM), Key: key}, at("order.pem"), "certificate 2 in the file (for example.org): put that one first"},
		"expired":              {files(t, dir, "expired", expired), at("expired.pem"), "expired on " + date(expired.cert.NotAfter)},
		"not yet valid":        {files(t, dir, "early", early), at("early.pem"), "not valid before " + date(early.cert.NotBefore)},
		"expired issuer":       {Spec{Cert: write(t, at("dead.pem"), underDead.certPEM, deadCA.certPEM), Key: write(t, at("dead.key"), underDead.keyPEM)}, at("dead.pem"), "issuer's certificate (number 2 in the file): the certificate of Dead CA expired"},
		"encrypted":            {Spec{Cert: cert, Key: write(t, at("enc.key"), encrypted)}, at("enc.key"), "openssl pkey"},
		"encrypted, old style": {Spec{Cert: cert, Key: write(t, at("enc1.key"), oldEncrypted)}, at("enc1.key"), "openssl pkey"},
		"broken key":           {Spec{Cert: cert, Key: write(t, at("bad.key"), []byte("-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n"))}, at("bad.key"), "can't be parsed"},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "unreadable" && os.Geteuid() == 0 {
				unprivileged(t, tc.spec, tc.want)
				return
			}
			var log logs.Log
			_, err := Load([]Spec{{Cert: cert, Key: key}, tc.spec}, log.Logger())
			if err == nil {
				t.Fatal("loaded")
			}
			if !strings.HasPrefix(err.Error(), tc.file+": ") || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %q, want %q to begin it, and %q in it", err, tc.file, tc.want)
			}
			if strings.Count(err.Error(), tc.file) != 1 {
				t.Errorf("error %q names the file more than once", err)
			}
			var fe *FileError
			if !errors.As(err, &fe) || fe.File != tc.file {
				t.Errorf("FileError %+v", fe)
			}
		})
	}

	t.Run("all at once", func(t *testing.T) {
		var log logs.Log
		_, err := Load([]Spec{{Cert: at("none.pem")}, {Cert: cert, Key: at("none.key")}}, log.Logger())
		if err == nil || !strings.Contains(err.Error(), "none.pem") || !strings.Contains(err.Error(), "none.key") {
			t.Errorf("error %v, want both files", err)
		}
	})
	t.Run("none", func(t *testing.T) {
		if _, err := Load(nil, nil); err == nil {
			t.Error("no certificates at all is fine?")
		}
	})
}

// unprivileged runs the one case that root can't see as nobody.
func unprivileged(t *testing.T, spec Spec, want string) {
	t.Helper()
	if os.Getenv("TLSTERM_AS_NOBODY") != "" {
		t.Fatal("still root")
	}
	// The test's directories are root's alone: what nobody can't search, nobody
	// can't read, and says so too.
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	home, err := os.MkdirTemp("", "tlsterm-nobody-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(home)
	os.Chmod(home, 0o755)
	copied := filepath.Join(home, "tlsterm.test")
	data, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(copied, data, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(copied, "-test.run=^TestAsNobody$")
	asNobody(t, cmd)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), "TLSTERM_AS_NOBODY="+spec.Cert+":"+spec.Key)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), want) {
		t.Errorf("as nobody: %v\n%s", err, out)
	}
}

// TestAsNobody is the child of unprivileged.
func TestAsNobody(t *testing.T) {
	cert, key, ok := strings.Cut(os.Getenv("TLSTERM_AS_NOBODY"), ":")
	if !ok {
		return // not the child: nothing to do
	}
	_, err := Load([]Spec{{Cert: cert, Key: key}}, new(logs.Log).Logger())
	os.Stdout.WriteString(err.Error())
}

// TestLoadWarns checks what is served but said.
func TestLoadWarns(t *testing.T) {
	dir := t.TempDir()
	root := mint(t, nil, nil, authority("Test Root"))
	ca := mint(t, root, nil, authority("Test CA"))
	for name, tc := range map[string]struct {
		m     *minted
		chain []byte
		mode  os.FileMode
		want  string // "" means no warning
	}{
		"whole chain":          {m: mint(t, ca, []string{"a.example.org"}), chain: ca.certPEM},
		"self-signed":          {m: mint(t, nil, []string{"b.example.org"}, func(c *x509.Certificate) { c.Subject.CommonName = "b" })},
		"missing intermediate": {m: mint(t, ca, []string{"c.example.org"}), want: "issuer, Test CA, is not in the file"},
		"wrong intermediate":   {m: mint(t, ca, []string{"d.example.org"}), chain: root.certPEM, want: "issuer, Test CA, is not in the file"},
		"expires soon":         {m: mint(t, ca, []string{"e.example.org"}, validFor(-89*24*time.Hour, 24*time.Hour)), chain: ca.certPEM, want: "expires on"},
		"short life, not soon": {m: mint(t, ca, []string{"f.example.org"}, validFor(-time.Hour, 6*24*time.Hour)), chain: ca.certPEM},
		"common name only":     {m: mint(t, ca, nil, func(c *x509.Certificate) { c.Subject.CommonName = "g.example.org" }), chain: ca.certPEM, want: "subjectAltName"},
		"client certificate":   {m: mint(t, ca, []string{"h.example.org"}, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }), chain: ca.certPEM, want: "serverAuth"},
		"open key":             {m: mint(t, ca, []string{"i.example.org"}), chain: ca.certPEM, mode: 0o644, want: "chmod 600"},
	} {
		t.Run(name, func(t *testing.T) {
			base := filepath.Join(dir, strings.ReplaceAll(name, " ", "-"))
			spec := Spec{Cert: write(t, base+".pem", tc.m.certPEM, tc.chain), Key: write(t, base+".key", tc.m.keyPEM)}
			if tc.mode != 0 {
				os.Chmod(spec.Key, tc.mode)
			}
			var log logs.Log
			if _, err := Load([]Spec{spec}, log.Logger()); err != nil {
				t.Fatal(err)
			}
			if tc.want == "" && log.String() != "" {
				t.Errorf("warned: %s", log.String())
			}
			if tc.want != "" && !strings.Contains(log.String(), tc.want) {
				t.Errorf("log %q, want %q in it", log.String(), tc.want)
			}
		})
	}
}

// TestKeyForms checks that the key's usual encodings, and one file for both,
// are read.
func TestKeyForms(t *testing.T) {
	dir := t.TempDir()
	ec := mint(t, nil, []string{"ec.example.org"})
	rs := mintKey(t, newRSA(t), nil, []string{"rsa.example.org"})
	ecDER, _ := x509.MarshalECPrivateKey(ec.key.(*ecdsa.PrivateKey))
	params := []byte("-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n")
	for name, spec := range map[string]Spec{
		"PKCS #8 RSA":   files(t, dir, "rsa", rs),
		"SEC 1":         {Cert: write(t, dir+"/ec.pem", ec.certPEM), Key: write(t, dir+"/ec.key", params, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: ecDER}))},
		"one file":      {Cert: write(t, dir+"/one.pem", ec.keyPEM, ec.certPEM), Key: dir + "/one.pem"},
		"key left out":  {Cert: write(t, dir+"/left.pem", ec.certPEM, ec.keyPEM)},
		"text and CRLF": {Cert: write(t, dir+"/crlf.pem", []byte("subject=CN\r\n"+strings.ReplaceAll(string(ec.certPEM), "\n", "\r\n"))), Key: write(t, dir+"/crlf.key", ec.keyPEM)},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := Load([]Spec{spec}, new(logs.Log).Logger())
			if err != nil {
				t.Fatal(err)
			}
			served(t, serve(t, s.Config()), "")
		})
	}
}

// TestChoice checks which certificate a hello gets, over real handshakes.
func TestChoice(t *testing.T) {
	dir := t.TempDir()
	first := mint(t, nil, []string{"first.example.org", "192.0.2.7", "2001:db8::7"})
	wild := mint(t, nil, []string{"*.example.org"})
	exact := mint(t, nil, []string{"exact.example.org"})
	asked := mint(t, nil, []string{"asked.example.org"})
	funcErr := errors.New("the authority is on holiday")
	specs := []Spec{
		files(t, dir, "first", first), files(t, dir, "wild", wild), files(t, dir, "exact", exact),
		{Name: "asked", Covers: func(n string) bool {
			return n == "asked.example.org" || n == "broken.example.net" || n == "none.example.net"
		},
			GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
				switch h.ServerName {
				case "broken.example.net":
					return nil, funcErr
				case "none.example.net":
					return nil, nil
				}
				return &tls.Certificate{Certificate: [][]byte{asked.cert.Raw}, PrivateKey: asked.key}, nil
			}},
	}
	s, err := Load(specs, new(logs.Log).Logger())
	if err != nil {
		t.Fatal(err)
	}
	addr := serve(t, s.Config())
	for name, tc := range map[string]struct {
		sni   string
		want  *minted
		alert string
	}{
		"no name":              {"", first, ""},
		"exact":                {"exact.example.org", exact, ""},
		"exact, upper case":    {"EXACT.example.ORG", exact, ""},
		"wildcard":             {"any.example.org", wild, ""},
		"wildcard, two labels": {"a.b.example.org", nil, "unrecognized name"},
		"wildcard's parent":    {"example.org", nil, "unrecognized name"},
		"unknown":              {"example.com", nil, "unrecognized name"},
		"asked":                {"asked.example.org", asked, ""},
		"asked, fails":         {"broken.example.net", nil, "internal error"},
		"asked, has none":      {"none.example.net", nil, "unrecognized name"},
	} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			t.Run(name+" "+tls.VersionName(version), func(t *testing.T) {
				st, err := hello(t, addr, tc.sni, func(c *tls.Config) { c.MinVersion, c.MaxVersion = version, version })
				switch {
				case tc.alert != "":
					if err == nil || !strings.Contains(err.Error(), tc.alert) {
						t.Errorf("error %v, want the alert %q", err, tc.alert)
					}
				case err != nil:
					t.Error(err)
				case !st.PeerCertificates[0].Equal(tc.want.cert):
					t.Errorf("served %v, want %v", st.PeerCertificates[0].DNSNames, tc.want.cert.DNSNames)
				}
			})
		}
	}
	for host, want := range map[string]bool{
		"first.example.org": true, "FIRST.Example.org.": true, "any.example.org": true, "a.b.example.org": false,
		"example.org": false, "example.com": false, "": false, "asked.example.org": true,
		"192.0.2.7": true, "192.0.2.8": false, "[2001:db8::7]": true, "2001:0db8::7": true, "2.0.2.7": false,
	} {
		if got := s.set.Load().covers(canonical(host)); got != want {
			t.Errorf("Covers(%q) = %v", host, got)
		}
	}
	infos := s.Certificates()
	if len(infos) != 4 || !infos[0].Default || infos[1].Default || infos[1].Names[0] != "*.example.org" || infos[3].Source != "asked" ||
		len(infos[0].Names) != 3 || infos[0].Source != specs[0].Cert || !infos[0].NotAfter.Equal(first.cert.NotAfter) {
		t.Errorf("Certificates() = %+v", infos)
	}
}

// TestShared checks which names have one certificate.
func TestShared(t *testing.T) {
	dir := t.TempDir()
	asked := mint(t, nil, []string{"*.asked.org"})
	specs := []Spec{files(t, dir, "a", mint(t, nil, []string{"a.org", "*.a.org"})), files(t, dir, "b", mint(t, nil, []string{"b.org"})),
		{Name: "asked", Covers: func(name string) bool { return strings.HasSuffix(name, ".asked.org") },
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
				return &tls.Certificate{Certificate: [][]byte{asked.cert.Raw}, PrivateKey: asked.key}, nil
			}}}
	var log logs.Log
	s, err := Load(specs, log.Logger())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, other string
		want        bool
	}{
		{"a.org", "x.a.org", true}, {"X.A.org.", "a.org", true}, {"x.a.org", "y.x.a.org", false}, {"a.org", "b.org", false}, {"b.org", "a.org", false},
		{"x.asked.org", "y.asked.org", true}, {"x.asked.org", "asked.org", false}, {"nobody.org", "a.org", false}, {"", "a.org", false},
	} {
		if got := s.Shared(c.name, c.other); got != c.want {
			t.Errorf("Shared(%q, %q) = %t", c.name, c.other, got)
		}
	}
}

// TestTwoKinds checks that of an RSA and an ECDSA certificate for one name each
// client gets one that it can verify.
func TestTwoKinds(t *testing.T) {
	dir := t.TempDir()
	ec := mint(t, nil, []string{"example.org"})
	rs := mintKey(t, newRSA(t), nil, []string{"example.org"})
	s, err := Load([]Spec{files(t, dir, "ec", ec), files(t, dir, "rsa", rs)}, new(logs.Log).Logger())
	if err != nil {
		t.Fatal(err)
	}
	addr := serve(t, s.Config())
	if got := served(t, addr, "example.org"); !got.Equal(ec.cert) {
		t.Error("a client that can all got the second")
	}
	onlyRSA := func(c *tls.Config) {
		c.MaxVersion, c.CipherSuites = tls.VersionTLS12, []uint16{tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256}
	}
	if got := served(t, addr, "example.org", onlyRSA); !got.Equal(rs.cert) {
		t.Error("a client that can only RSA got ECDSA")
	}
}

// TestConfig checks versions, protocols and session tickets, and that a ticket
// does not open a name that nobody serves.
func TestConfig(t *testing.T) {
	dir := t.TempDir()
	s, err := Load([]Spec{files(t, dir, "a", mint(t, nil, []string{"example.org"}))}, new(logs.Log).Logger())
	if err != nil {
		t.Fatal(err)
	}
	addr := serve(t, s.Config())
	if _, err := hello(t, addr, "example.org", func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS11, tls.VersionTLS11 }); err == nil {
		t.Error("TLS 1.1 is served")
	}
	for offer, want := range map[string]string{"h2,http/1.1": "h2", "http/1.1": "http/1.1", "": ""} {
		st, err := hello(t, addr, "example.org", func(c *tls.Config) {
			if offer != "" {
				c.NextProtos = strings.Split(offer, ",")
			}
		})
		if err != nil || st.NegotiatedProtocol != want {
			t.Errorf("offered %q: %q, %v", offer, st.NegotiatedProtocol, err)
		}
	}
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		cache := tls.NewLRUClientSessionCache(4)
		resume := func(c *tls.Config) {
			c.MinVersion, c.MaxVersion = version, version
			c.ClientSessionCache = anyName{cache}
		}
		for i := range 2 {
			st, err := hello(t, addr, "example.org", resume)
			if err != nil || st.DidResume != (i == 1) {
				t.Errorf("%s, handshake %d: resumed %v, %v", tls.VersionName(version), i+1, st.DidResume, err)
			}
		}
		if st, err := hello(t, addr, "stranger.example.net", resume); err == nil || !strings.Contains(err.Error(), "unrecognized name") {
			t.Errorf("%s: a ticket for example.org with the name of a stranger: resumed %v, %v", tls.VersionName(version), st.DidResume, err)
		}
	}
}

// anyName gives one session for all names.
type anyName struct{ tls.ClientSessionCache }

func (a anyName) Get(string) (*tls.ClientSessionState, bool) { return a.ClientSessionCache.Get("x") }
func (a anyName) Put(_ string, s *tls.ClientSessionState)    { a.ClientSessionCache.Put("x", s) }

// patience is for what comes sooner or later, on a machine that is busy too.
const patience = time.Minute

// eventually waits for what Run does.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("not within %v: %s", patience, what)
}

// TestFollowsFiles replaces files in the ways that people and tools do while
// handshakes go on, none of which may fail or see a broken pair.
func TestFollowsFiles(t *testing.T) {
	dir := t.TempDir()
	old, next := mint(t, nil, []string{"example.org"}), mint(t, nil, []string{"example.org", "www.example.org"})
	steady := mint(t, nil, []string{"steady.example.org"})
	spec := files(t, dir, "a", old)
	var log logs.Log
	s, err := Load([]Spec{spec, files(t, dir, "steady", steady)}, log.Logger())
	if err != nil {
		t.Fatal(err)
	}
	addr := serve(t, s.Config())
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { s.Run(ctx) })
	wg.Go(func() {
		for ctx.Err() == nil {
			if _, err := hello(t, addr, "example.org"); err != nil && ctx.Err() == nil {
				t.Errorf("a handshake failed during a reload: %v", err)
			}
			time.Sleep(5 * time.Millisecond)
		}
	})

	// One file after the other, with a pause in which they don't match.
	write(t, spec.Cert, next.certPEM)
	time.Sleep(filestamp.Every + filestamp.Every/2)
	if got := served(t, addr, "example.org"); !got.Equal(old.cert) {
		t.Fatal("served a certificate without its key")
	}
	write(t, spec.Key, next.keyPEM)
	eventually(t, "the new pair is served", func() bool { return served(t, addr, "example.org").Equal(next.cert) })
	if !s.set.Load().covers(canonical("www.example.org")) {
		t.Error("the new name is not covered")
	}

	// Broken for good: the old one stays, the log says it once.
	write(t, spec.Cert, []byte("rubbish\n"))
	eventually(t, "the log says why", func() bool { return strings.Contains(log.String(), "is not PEM") })
	time.Sleep(2 * filestamp.Every)
	if n := strings.Count(log.String(), "is not PEM"); n != 1 {
		t.Errorf("logged %d times:\n%s", n, log.String())
	}
	if got := served(t, addr, "example.org"); !got.Equal(next.cert) {
		t.Error("a broken file took the old certificate away")
	}

	// Gone, and back by writing in place.
	os.Remove(spec.Cert)
	eventually(t, "the log says that it is gone", func() bool { return strings.Contains(log.String(), "no such file") })
	os.WriteFile(spec.Cert, old.certPEM, 0o600)
	os.WriteFile(spec.Key, old.keyPEM, 0o600)
	eventually(t, "what came back is served", func() bool { return served(t, addr, "example.org").Equal(old.cert) })
	if got := served(t, addr, "steady.example.org"); !got.Equal(steady.cert) {
		t.Error("the other pair changed")
	}
}

// TestFollowsLinks replaces a link, as certbot and Kubernetes do.
func TestFollowsLinks(t *testing.T) {
	dir := t.TempDir()
	old, next := mint(t, nil, []string{"example.org"}), mint(t, nil, []string{"example.org"})
	for name, m := range map[string]*minted{"1": old, "2": next} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		files(t, filepath.Join(dir, name), "tls", m)
	}
	link := filepath.Join(dir, "live")
	if err := os.Symlink("1", link); err != nil {
		t.Fatal(err)
	}
	s, err := Load([]Spec{{Cert: link + "/tls.pem", Key: link + "/tls.key"}}, new(logs.Log).Logger())
	if err != nil {
		t.Fatal(err)
	}
	addr := serve(t, s.Config())
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	wg.Go(func() { s.Run(ctx) })
	defer wg.Wait()
	defer cancel()
	if err := os.Symlink("2", link+".new"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(link+".new", link); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the link's new target is served", func() bool { return served(t, addr, "example.org").Equal(next.cert) })
}

// TestReload checks the reload by hand: what is good is taken, what is broken
// keeps the old and is in the error.
func TestReload(t *testing.T) {
	dir := t.TempDir()
	a, a2 := mint(t, nil, []string{"a.example.org"}), mint(t, nil, []string{"a.example.org"})
	b := mint(t, nil, []string{"b.example.org"})
	specA, specB := files(t, dir, "a", a), files(t, dir, "b", b)
	s, err := Load([]Spec{specA, specB}, new(logs.Log).Logger())
	if err != nil {
		t.Fatal(err)
	}
	addr := serve(t, s.Config())
	files(t, dir, "a", a2)
	write(t, specB.Key, a.keyPEM)
	err = s.Reload()
	if err == nil || !strings.Contains(err.Error(), specB.Key) || strings.Contains(err.Error(), specA.Cert) {
		t.Errorf("error %v, want that of %s alone", err, specB.Key)
	}
	if !served(t, addr, "a.example.org").Equal(a2.cert) {
		t.Error("the good pair was not taken")
	}
	if !served(t, addr, "b.example.org").Equal(b.cert) {
		t.Error("the broken pair took the old one away")
	}
}

// TestExpiresWhileServed checks that a certificate which runs out keeps being
// served, also through a reload and a change of the config, and is logged.
func TestExpiresWhileServed(t *testing.T) {
	dir := t.TempDir()
	short := mint(t, nil, []string{"short.example.org"}, validFor(-time.Hour, 5*time.Second))
	spec := files(t, dir, "short", short)
	var log logs.Log
	s, err := Load([]Spec{spec}, log.Logger())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "expires on") {
		t.Error("no warning at load")
	}
	addr := serve(t, s.Config())
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { s.Run(ctx) })
	defer wg.Wait()
	defer cancel()
	eventually(t, "the log says that it has expired", func() bool { return strings.Contains(log.String(), "has expired and is still served") })
	if !served(t, addr, "short.example.org").Equal(short.cert) {
		t.Error("not served any more")
	}
	if err := s.Reload(); err == nil || !strings.Contains(err.Error(), "expired on") {
		t.Errorf("Reload: %v, want that it has expired", err)
	}
	other := mint(t, nil, []string{"other.example.org"})
	apply, err := s.Prepare([]Spec{spec, files(t, dir, "other", other)})
	if err != nil {
		t.Fatalf("another certificate can't be added any more: %v", err)
	}
	if s.set.Load().covers(canonical("other.example.org")) {
		t.Error("Prepare has applied")
	}
	apply()
	if !served(t, addr, "short.example.org").Equal(short.cert) || !served(t, addr, "other.example.org").Equal(other.cert) {
		t.Error("not both are served after apply")
	}
	if _, err := Load([]Spec{spec}, log.Logger()); err == nil {
		t.Error("a fresh start takes an expired certificate")
	}
}

func BenchmarkCovers(b *testing.B) {
	dir := b.TempDir()
	s, err := Load([]Spec{files(b, dir, "a", mint(b, nil, []string{"example.org", "*.example.org"}))}, new(logs.Log).Logger())
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		s.set.Load().covers(canonical("www.example.org"))
	}
}

// Reload reads all files again. Pairs that are whole are served from then on; a
// broken pair keeps what was served before, if anything was, and is in the error.
func (s *Store) Reload() error {
	s.reload.Lock()
	defer s.reload.Unlock()
	return s.refresh(func(*entry) bool { return true })
}
