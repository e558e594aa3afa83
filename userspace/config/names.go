package config

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"unicode"

	"golang.org/x/net/idna"
)

// maxName is the longest DNS name in presentation form, without a dot at its end (RFC 1035 2.3.4).
const maxName = 253

// toASCII finds the A-label form that a browser would send for a name typed in Unicode.
var toASCII = idna.New(idna.MapForLookup(), idna.BidiRule(), idna.Transitional(false), idna.StrictDomainName(false))

// checkPattern checks a server name or host of a route: a name, or "*." and a name.
func checkPattern(s string) (string, error) {
	switch rest, wild := strings.CutPrefix(s, "*."); {
	case s == "*" || wild && rest == "":
		return "", errors.New("a wildcard for every name is not supported, use default")
	case strings.Contains(rest, "*"):
		return "", errors.New("a wildcard is the whole first label, as in \"*.example.org\"")
	case wild:
		name, err := checkName(rest)
		if err != nil {
			return "", within("*.", err, "")
		}
		return "*." + name, refuse(len(name)+2 > maxName, "the name is longer than %d characters", maxName)
	}
	return checkName(s)
}

// adviceError says what to write in the place of a name.
type adviceError struct{ text, instead string }

func (e *adviceError) Error() string { return e.text + strconv.Quote(masked(e.instead)) }

// within puts what stood around a name back into the advice of its error, if it has any.
func within(before string, err error, after string) error {
	if e, ok := err.(*adviceError); ok {
		return &adviceError{e.text, before + e.instead + after}
	}
	return err
}

// checkName checks a DNS name and returns it in the form that server names are compared in: lower-case
// A-labels without a dot at the end. Underscores are let through: they are no host names, but are used.
func checkName(s string) (string, error) {
	if s == "" {
		return "", errors.New("the name is empty")
	}
	if _, after, ok := strings.Cut(s, "://"); ok {
		host, _, _ := strings.Cut(after, "/")
		host, _, _ = strings.Cut(host, ":")
		return "", &adviceError{"it is a URL, write the name alone: ", host}
	}
	if host, _, ok := strings.Cut(s, "/"); ok {
		return "", &adviceError{"it has a path, write the name alone: ", host}
	}
	if _, err := netip.ParseAddr(strings.Trim(s, "[]")); err == nil {
		return "", errors.New("it is an IP address, and names never are (RFC 6066)")
	}
	if host, port, ok := strings.Cut(s, ":"); ok {
		if _, err := parsePort(port); err == nil {
			return "", &adviceError{"it has a port, write the name alone: ", host}
		}
		return "", errors.New("':' cannot be in a name")
	}
	name := strings.ToLower(strings.TrimSuffix(s, "."))
	if strings.ContainsFunc(name, beyondASCII) {
		a, err := toASCII.ToASCII(name)
		if err != nil || strings.ContainsFunc(a, beyondASCII) {
			return "", errors.New("not a valid internationalised name")
		}
		if _, err := checkName(a); err != nil {
			return "", err
		}
		return "", &adviceError{"clients send this name as its A-label, write ", a}
	}
	if len(name) > maxName {
		return "", fmt.Errorf("the name is longer than %d characters", maxName)
	}
	if name == "" {
		return "", errors.New("the name is empty")
	}
	labels := strings.Split(name, ".")
	for _, l := range labels {
		if err := checkLabel(l); err != nil {
			return "", err
		}
	}
	number := strings.Trim(labels[len(labels)-1], "0123456789") == ""
	return name, refuse(len(labels) > 1 && number, "its last label is a number, as in an IP address")
}

func checkLabel(l string) error {
	switch {
	case l == "":
		return errors.New("a label between dots is empty")
	case len(l) > 63:
		return fmt.Errorf("the label %q is longer than 63 characters", l)
	case l[0] == '-' || l[len(l)-1] == '-':
		return fmt.Errorf("the label %q begins or ends with a hyphen", l)
	}
	for _, c := range l {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return fmt.Errorf("%q cannot be in a name", c)
		}
	}
	if strings.HasPrefix(l, "xn--") {
		_, err := toASCII.ToUnicode(l)
		return refuse(err != nil, "%q is not a valid A-label", l)
	}
	return nil
}

func beyondASCII(r rune) bool { return r > unicode.MaxASCII }
