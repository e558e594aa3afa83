package acme

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"path"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/mholt/acmez/v3"
	"github.com/mholt/acmez/v3/acme"
)

// issuer orders certificates from one authority, for certmagic, whose own binds ports for its challenges.
type issuer struct {
	m      *Manager
	policy *policy
	ca     CA
	http   *http.Client

	mu sync.Mutex // one registration at a time
	// +checklocks:mu
	account *acme.Account
}

// IssuerKey implements certmagic.Issuer: the key of certmagic's own ACME issuer, so its storage can be used.
func (i *issuer) IssuerKey() string { return (&certmagic.ACMEIssuer{CA: i.ca.Directory}).IssuerKey() }

// client is for one attempt, so that what it reports belongs to that one.
func (i *issuer) client(a *attempt) *acmez.Client {
	c := &acmez.Client{
		Client: &acme.Client{Directory: i.ca.Directory, HTTPClient: i.http, UserAgent: "tailsplice",
			PollTimeout: 90 * time.Second, Logger: slog.New(protocolLog{i.m.log.Handler(), a})},
		ChallengeSolvers: map[string]acmez.Solver{},
	}
	for _, kind := range i.policy.settings.Challenges {
		switch kind {
		case HTTP01:
			c.ChallengeSolvers[kind] = httpSolver{&i.m.challenges}
		case TLSALPN01:
			c.ChallengeSolvers[kind] = helloSolver{&i.m.challenges}
		case DNS01:
			c.ChallengeSolvers[kind] = hookSolver{i.policy.settings.DNS}
		}
	}
	return c
}

// Issue implements certmagic.Issuer.
func (i *issuer) Issue(ctx context.Context, csr *x509.CertificateRequest) (*certmagic.IssuedCertificate, error) {
	a := attemptOf(ctx)
	if a == nil { // certmagic's own idea: a certificate was revoked
		a = &attempt{}
	}
	cert, err := i.issue(ctx, a, csr)
	if err != nil {
		a.failed = append(a.failed, failure{i.ca, a.problems, err})
		a.problems = nil
		return nil, err
	}
	a.issuer = i
	return &certmagic.IssuedCertificate{Certificate: cert.ChainPEM, Metadata: cert}, nil
}

func (i *issuer) issue(ctx context.Context, a *attempt, csr *x509.CertificateRequest) (acme.Certificate, error) {
	client := i.client(a)
	replaces := a.replaces
	if a.replacesOf != i.IssuerKey() {
		replaces = nil
	}
	for registered := false; ; {
		account, err := i.register(ctx, client)
		if err != nil {
			return acme.Certificate{}, err
		}
		params, err := acmez.OrderParametersFromCSR(account, csr)
		if err != nil {
			return acme.Certificate{}, err
		}
		params.Replaces = replaces // RFC 9773 5: such an order is spared the rate limits
		chains, err := client.ObtainCertificate(ctx, params)
		switch p, isProblem := errors.AsType[acme.Problem](err); {
		case isProblem && p.Type == acme.ProblemTypeAccountDoesNotExist && !registered:
			registered = true
			i.m.log.Warn("the authority does not know the acme account any more: a new one is registered", "ca", i.ca.Directory)
			if err := i.forget(ctx); err != nil {
				return acme.Certificate{}, err
			}
			continue
		case isProblem && p.Resource == nil && p.Type != acme.ProblemTypeRateLimited && replaces != nil:
			// It may not know the certificate, nor who signed it: an authority that was set up anew.
			replaces = nil
			continue
		case err != nil:
			return acme.Certificate{}, err
		case len(chains) == 0:
			return acme.Certificate{}, errors.New("the authority sent no certificate")
		}
		return chains[0], nil
	}
}

// storedAccount is an account as it is kept.
type storedAccount struct {
	acme.Account
	Key []byte `json:"key"` // PEM
}

func (i *issuer) accountKey() string {
	who := cmp.Or(i.policy.settings.Email, "default")
	if i.ca.EABKeyID != "" {
		who += " " + i.ca.EABKeyID
	}
	return path.Join("accounts", certmagic.StorageKeys.Safe(i.IssuerKey()), certmagic.StorageKeys.Safe(who)+".json")
}

// register returns the account: the one in use, the one in storage, or a new one.
func (i *issuer) register(ctx context.Context, client *acmez.Client) (acme.Account, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.account != nil {
		return *i.account, nil
	}
	account, err := i.load(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		account, err = i.create(ctx, client)
	} else if err != nil {
		err = fmt.Errorf("read the acme account: %w", err)
	}
	if err == nil {
		i.account = &account
	}
	return account, err
}

func (i *issuer) load(ctx context.Context) (acme.Account, error) {
	b, err := i.policy.storage.Load(ctx, i.accountKey())
	if err != nil {
		return acme.Account{}, err
	}
	var s storedAccount
	if err := json.Unmarshal(b, &s); err != nil {
		return acme.Account{}, err
	}
	key, err := certmagic.PEMDecodePrivateKey(s.Key)
	s.PrivateKey = key
	return s.Account, err
}

func (i *issuer) create(ctx context.Context, client *acmez.Client) (acme.Account, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return acme.Account{}, err
	}
	account := acme.Account{TermsOfServiceAgreed: true, PrivateKey: crypto.Signer(key)}
	if e := i.policy.settings.Email; e != "" {
		account.Contact = []string{"mailto:" + e}
	}
	if i.ca.EABKeyID != "" {
		eab := acme.EAB{KeyID: i.ca.EABKeyID, MACKey: i.ca.EABMACKey}
		if err := account.SetExternalAccountBinding(ctx, client.Client, eab); err != nil {
			return account, fmt.Errorf("external account binding: %w", err)
		}
	}
	if account, err = client.NewAccount(ctx, account); err != nil {
		return account, fmt.Errorf("register an acme account: %w", err)
	}
	pem, err := certmagic.PEMEncodePrivateKey(key)
	if err != nil {
		return account, err
	}
	b, err := json.MarshalIndent(storedAccount{account, pem}, "", "\t")
	if err != nil {
		return account, err
	}
	i.m.log.Info("registered an acme account: its terms of service count as agreed to by the configuration", "ca", i.ca.Directory, "email", i.policy.settings.Email)
	return account, i.policy.storage.Store(ctx, i.accountKey(), b)
}

func (i *issuer) forget(ctx context.Context) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.account = nil
	return i.policy.storage.Delete(ctx, i.accountKey())
}
