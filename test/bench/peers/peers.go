// Package peers holds the configurations of what is compared, as files to read. @WORDS@ are filled in by the
// run.
package peers

import (
	"embed"
	"fmt"
	"strings"
)

//go:embed *.cfg *.conf *.yaml *.nft *.lua
var files embed.FS

// Render fills in the @WORDS@ of a configuration; a word that is not given is an error.
func Render(name string, words map[string]string) (string, error) {
	b, err := files.ReadFile(name)
	if err != nil {
		return "", err
	}
	var pairs []string
	for k, v := range words {
		pairs = append(pairs, "@"+k+"@", v)
	}
	s := strings.NewReplacer(pairs...).Replace(string(b))
	if i := strings.IndexByte(s, '@'); i >= 0 {
		return "", fmt.Errorf("%s: a word is not filled in: %.20q", name, s[i:])
	}
	return s, nil
}
