package main

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestKernelPage: each fact in docs/kernel.md names the tests that hold it, but for those under one heading.
// TestClaims sees whether these tests exist.
func TestKernelPage(t *testing.T) {
	text, err := os.ReadFile("../../docs/kernel.md")
	if err != nil {
		t.Fatal(err)
	}
	held, wrong := untested(string(text))
	for _, w := range wrong {
		t.Errorf("docs/kernel.md: %s", w)
	}
	if held < 30 {
		t.Errorf("found %d facts in docs/kernel.md", held)
	}
}

// without is the heading above the facts that no test holds.
const without = "## Held by no test"

var (
	heldBy    = regexp.MustCompile(`(?s)\((?:` + "`Test[A-Z]\\w*`" + `,?\s*)+\)$`)
	sourcedBy = regexp.MustCompile(`\((?:seen|read)\)$`)
)

// untested counts the facts of a page that name a test, and gives the others.
func untested(page string) (held int, wrong []string) {
	tested, rest, found := strings.Cut(page, without+"\n")
	if !found {
		wrong = append(wrong, "the heading of what no test holds is gone: "+without)
	}
	for _, part := range []struct {
		text string
		ends *regexp.Regexp
		want string
	}{{tested, heldBy, "the tests that hold it"}, {rest, sourcedBy, "(seen) or (read)"}} {
		for _, fact := range strings.Split("\n"+part.text, "\n- ")[1:] {
			fact, _, _ = strings.Cut(fact, "\n\n")
			if fact = strings.TrimSpace(fact); !part.ends.MatchString(fact) {
				wrong = append(wrong, fmt.Sprintf("%q must end with %s", oneSpace(fact), part.want))
			} else if part.text == tested {
				held++
			}
		}
	}
	return held, wrong
}

func TestKernelPageFindsErrors(t *testing.T) {
	const page = "# A\n\nText.\n\n- one. (`TestOne`,\n  `TestTwo`)\n- two.\n- three `TestThree` says\n\n" +
		"## B\n\n- four. (`TestFour`)\n\n" + without + "\n\n- five. (seen)\n- six.\n"
	held, wrong := untested(page)
	if held != 2 || len(wrong) != 3 {
		t.Errorf("%d facts are held, wrong: %q", held, wrong)
	}
}
