package server

import (
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"net/http"
	"testing"

	"golang.org/x/crypto/bcrypt"
)

// TestPasswordsGuessed: a source guesses 240 passwords at once. Somebody else, who
// knows one, is let in before more than a few of them were checked; a password
// that is known already is asked of nobody. Each guess is answered.
func TestPasswordsGuessed(t *testing.T) {
	const guesses = 240
	hash, err := bcrypt.GenerateFromPassword([]byte("secret"), 8)
	if err != nil {
		t.Fatal(err)
	}
	basic := func(user, password string) string {
		return "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
	}
	for _, v := range []struct {
		name   string
		secure bool
		family int // of the guesses; the others come by the other one
	}{
		{"HTTP/2 without TLS", false, 0}, {"HTTP/2 without TLS over IPv6", false, 1},
		{"HTTP/2 with TLS", true, 0}, {"HTTP/2 with TLS over IPv6", true, 1},
	} {
		t.Run(v.name, func(t *testing.T) {
			d, plain, secure, pool := floodDaemon(t, headers(t), "limits: { requests_per_source: 1000 }", fmt.Sprintf(", basic_auth: { users: { me: %q, you: %q } }", hash, hash))
			at, tlsConfig := plain, (*tls.Config)(nil)
			if v.secure {
				at, tlsConfig = secure, &tls.Config{RootCAs: pool, ServerName: "a.test"}
			}
			elsewhere := plain[1-v.family]
			if res, _ := ask(t, elsewhere, "GET", "a.test", "/", nil, basic("you", "secret")); res.StatusCode != 200 {
				t.Fatalf("a right password got %d", res.StatusCode)
			}
			var all []*flooder
			for n := range 3 {
				f := flood(t, at[v.family], tlsConfig, nil, 0)
				f.vary = func(stream int64) string {
					user := "me"
					if stream%2 == 1 {
						user = "nobody"
					}
					return basic(user, fmt.Sprintf("%s %d %d", v.name, n, stream))
				}
				f.open(guesses / 3)
				all = append(all, f)
			}
			wrong := func(f *flooder) int64 { return f.status[http.StatusUnauthorized].Load() }
			eventually(t, "the guesses are there", func() bool { return d.refused("wrong_password")+d.refused("passwords_over_limit") > 0 })
			if res, _ := ask(t, elsewhere, "GET", "a.test", "/", nil, basic("you", "secret")); res.StatusCode != 200 {
				t.Errorf("a password that is known already got %d", res.StatusCode)
			}
			if res, _ := ask(t, elsewhere, "GET", "a.test", "/", nil, basic("me", "secret")); res.StatusCode != 200 {
				t.Errorf("a right password got %d", res.StatusCode)
			}
			if n := floods(all, wrong); n > guesses/4 {
				t.Errorf("%d of %d wrong passwords were checked before a right one of somebody else", n, guesses)
			}
			eventually(t, "all guesses are answered", func() bool { return floods(all, wrong)+floods(all, refused) == guesses })
			if n := floods(all, refused); n == 0 || floods(all, told) != n || d.refused("passwords_over_limit") != n {
				t.Errorf("%d were not checked, %d of the answers say when to come again, %d are counted", n, floods(all, told), d.refused("passwords_over_limit"))
			}
			if d.log.Count("the password was not checked") == 0 {
				t.Error("the log does not say why")
			}
		})
	}
}
