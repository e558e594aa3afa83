package main

import (
	"flag"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/tailsplice/tailsplice/test/reference"
)

var update = flag.Bool("update", false, "write the pages of the reference and the man pages")

// manual is what a command's page says beside its help.
type manual struct {
	does, fails string // exit statuses 0 and 1
	files       [][2]string
	environment [][2]string
	signals     [][2]string
	see         []string // names of commands, beside tailsplice itself
}

var (
	fileConfig  = [2]string{"`/etc/tailsplice/tailsplice.yaml`", "the configuration, see [tailsplice.yaml(5)](configuration.md)"}
	fileControl = [2]string{"`/run/tailsplice/control.sock`", "the control socket of the daemon: root and the daemon's user may " +
		"use all commands, the socket's group those that only read"}
	filePins = [2]string{"`/sys/fs/bpf/tailsplice`", "the maps of kernel datapaths, in INSTANCE/GENERATION; INSTANCE/current leads to the newest"}
	fileACME = [2]string{"`/var/lib/tailsplice/acme`", "accounts, keys and certificates of ACME"}

	envTailscaled = [2]string{"`TAILSPLICE_TAILSCALED_SOCKET`", "the socket of tailscaled, where it is not at its usual place"}
	envDocker     = [2]string{"`DOCKER_HOST`", "the address of dockerd, by default `unix:///var/run/docker.sock`"}
	envProxy      = [2]string{"`HTTPS_PROXY`, `HTTP_PROXY`, `NO_PROXY`", "the proxy by which ACME authorities are reached"}
	envValues     = [2]string{"`NAME`", "any variable that the configuration uses as `${NAME}`"}

	asksDaemon = manual{
		does:  "the daemon has answered",
		fails: "no daemon answers, or it answers with an error",
		files: [][2]string{fileControl},
	}
)

// manuals has a manual for each command; "" is tailsplice itself.
var manuals = map[string]manual{
	"": {
		does:        "the command has done what it is for",
		fails:       "it has not; standard error says why",
		files:       [][2]string{fileConfig, fileControl, filePins, fileACME},
		environment: [][2]string{envTailscaled, envDocker, envProxy, envValues},
	},
	"run": {
		does:  "a signal has stopped the daemon, also if it had to close connections",
		fails: "the daemon could not start; standard error says why",
		files: [][2]string{fileConfig, fileControl, filePins, fileACME},
		environment: [][2]string{envTailscaled, envDocker, envProxy,
			{"`NOTIFY_SOCKET`", "the socket on which systemd is told that the daemon is ready, reloads or stops, and which process it is, " +
				"and is given the listening sockets to keep (`FDSTORE=1`)"},
			{"`LISTEN_FDS`, `LISTEN_FDNAMES`", "what systemd has kept of a process that has crashed"},
			{"`WATCHDOG_USEC`", "within how many microseconds systemd is to hear that the daemon serves"}, envValues},
		signals: [][2]string{
			{"`SIGHUP`", "reloads the configuration and reopens the access logs"},
			{"`SIGTERM`, `SIGINT`", "stop accepting connections, wait for the open ones to finish (`--drain-timeout`), and then " +
				"close the rest; the same signal a second time closes them at once"},
			{"`SIGPIPE`", "is ignored, so that a reader of the log that goes away does not end the daemon"},
		},
		see: []string{"check", "reload", "status"},
	},
	"check": {
		does:        "the configuration can be used; there may be warnings",
		fails:       "there are errors, which standard error lists",
		files:       [][2]string{fileConfig},
		environment: [][2]string{{"`TAILSPLICE_TAILSCALED_SOCKET`, `DOCKER_HOST`", "with `--here`, as for `tailsplice run`"}, envValues},
		see:         []string{"run", "trace", "doctor"},
	},
	"status": with(asksDaemon, "flows", "top", "doctor"),
	"flows":  with(asksDaemon, "flows-kill", "top", "status"),
	"flows kill": {
		does:  "the flows were ended",
		fails: "no flow fits, or there is none of one of the ids; the user may not change the daemon; or no daemon answers",
		files: asksDaemon.files,
		see:   []string{"flows"},
	},
	"top": {
		does:        "the command was ended by `q` or a signal, or after `--rounds`",
		fails:       "no daemon answers, or it has ended",
		files:       asksDaemon.files,
		environment: [][2]string{{"`NO_COLOR`", "leaves colours out, if it is set"}},
		signals: [][2]string{
			{"`SIGINT`, `SIGTERM`", "end the command, with exit status 0"},
		},
		see: []string{"flows", "status"},
	},
	"trace": {
		does: "at least one listener leads to a target that answers or to a redirect, and none only to targets that do " +
			"not answer",
		fails:       "no listener leads anywhere, a listener leads only to targets that do not answer, or no daemon answers",
		files:       [][2]string{fileControl},
		environment: [][2]string{{"`TAILSPLICE_TAILSCALED_SOCKET`, `DOCKER_HOST`", "with `--config`, as for `tailsplice run`"}, envValues},
		see:         []string{"check", "status"},
	},
	"doctor": {
		does:        "the report was printed, whatever it says",
		fails:       "the report could not be printed",
		files:       [][2]string{fileControl, filePins},
		environment: [][2]string{envTailscaled, envDocker},
		see:         []string{"check", "status"},
	},
	"init": {
		does:        "the file was written",
		fails:       "the file exists and is not the unchanged one of a package, can't be written, or would not be valid",
		files:       [][2]string{fileConfig},
		environment: [][2]string{envTailscaled, envDocker},
		see:         []string{"check", "run"},
	},
	"drain": {
		does:  "the listeners are drained",
		fails: "there is no such listener, the user may not change the daemon, or no daemon answers",
		files: asksDaemon.files,
		see:   []string{"undrain", "status"},
	},
	"target disable": {
		does:  "the target is disabled",
		fails: "there is no such target, the user may not change the daemon, or no daemon answers",
		files: asksDaemon.files,
		see:   []string{"target-enable", "status", "drain"},
	},
	"target enable": {
		does:  "the target is not disabled",
		fails: "there is no such target, the user may not change the daemon, or no daemon answers",
		files: asksDaemon.files,
		see:   []string{"target-disable", "status"},
	},
	"log level": {
		does:  "the level was shown, or set",
		fails: "the user may not change the daemon, or no daemon answers",
		files: asksDaemon.files,
		see:   []string{"run"},
	},
	"undrain": {
		does:  "the listeners are not drained",
		fails: "there is no such listener, an address can't be bound yet, the user may not change the daemon, or no daemon answers",
		files: asksDaemon.files,
		see:   []string{"drain", "status"},
	},
	"reload": {
		does:  "the new configuration is in force",
		fails: "the configuration can't be used, or another program that is in the daemon's place can't take over, and nothing has changed; or no daemon answers",
		files: [][2]string{fileConfig, fileControl},
		see:   []string{"check", "run", "upgrade"},
	},
	"upgrade": {
		does:  "a new process serves",
		fails: "none does, and the daemon goes on as it was, or no daemon answers",
		files: [][2]string{fileConfig, fileControl},
		see:   []string{"run", "reload", "status"},
	},
	"hash-password": {
		does:  "the hash was printed",
		fails: "the password could not be read, the two entries differ, or the password is too long for bcrypt",
		see:   []string{"run"},
	},
	"version": {
		does:  "the version was printed",
		fails: "it could not be printed",
		see:   []string{"status"},
	},
	"completion": {
		does:  "the script was printed",
		fails: "it could not be printed",
		files: [][2]string{{"`/usr/share/bash-completion/completions/tailsplice`", "the script for bash, as the packages install it; " +
			"those for zsh and fish are installed too"}},
	},
}

func with(m manual, see ...string) manual {
	m.see = see
	return m
}

// badUsage is exit status 2 of each command.
const badUsage = "the command line is wrong: an unknown command or option, a missing argument or a value that is not valid"

// TestReferenceIsCurrent compares docs/reference/commands.md and the man pages with what the commands' help and the
// manuals say.
func TestReferenceIsCurrent(t *testing.T) {
	const from = "cmd/tailsplice"
	docs := filepath.Join("..", "..", "docs")
	root := newRoot()
	for name := range manuals {
		if name != "" && !slices.ContainsFunc(documented(root), func(c *cobra.Command) bool { return nameOf(c) == name }) {
			t.Errorf("manuals describes the command %s, and there is none", name)
		}
	}
	man := func(c *cobra.Command, p *reference.Page) {
		name := strings.ReplaceAll(c.CommandPath(), " ", "-")
		reference.Current(t, *update, filepath.Join(docs, "man", name+".8"), p.ManPage(name, 8, brief(c), from))
	}
	all := &reference.Page{}
	all.Text(root.Long)
	all.Web(index(root))
	all.Web(statuses(root))
	all.Append(general(root))
	man(root, rootPage(root))
	for _, c := range documented(root) {
		m, ok := manuals[nameOf(c)]
		if !ok {
			t.Errorf("describe the command %s in manuals: its exit statuses, files and so on", nameOf(c))
			continue
		}
		p := commandPage(c, m)
		all.Web("## " + c.CommandPath())
		all.Append(p)
		man(c, p)
	}
	reference.Current(t, *update, filepath.Join(docs, "reference", "commands.md"),
		all.Markdown("Commands, exit statuses and signals", from))
}

// documented are those that a page is about: commands that do something, and of those below another one those
// that have a manual of their own.
func documented(root *cobra.Command) (out []*cobra.Command) {
	for _, c := range root.Commands() {
		if c.Name() == "help" || c.Hidden {
			continue
		}
		own := ownPages(c)
		if len(own) == 0 || c.Args != nil {
			out = append(out, c)
		}
		out = append(out, own...)
	}
	return out
}

// ownPages are the commands below c that have a manual of their own.
func ownPages(c *cobra.Command) (out []*cobra.Command) {
	for _, sub := range c.Commands() {
		if _, ok := manuals[nameOf(sub)]; ok {
			out = append(out, sub)
		}
	}
	return out
}

// nameOf is how manuals calls a command: "flows kill".
func nameOf(c *cobra.Command) string {
	_, name, _ := strings.Cut(c.CommandPath(), " ")
	return name
}

// brief is what a command does, as it stands in the middle of a sentence.
func brief(c *cobra.Command) string {
	return strings.ToLower(c.Short[:1]) + c.Short[1:]
}

func index(root *cobra.Command) string {
	var b strings.Builder
	b.WriteString("| command | |\n|---|---|\n")
	for _, c := range documented(root) {
		fmt.Fprintf(&b, "| [`%s`](%s) | %s |\n", c.CommandPath(), reference.Anchor(c.CommandPath()), brief(c))
	}
	b.WriteString("\nSee also: [exit statuses](#exit-statuses), [signals](#signals), [files](#files), " +
		"[environment](#environment). `tailsplice --version` prints the version. " +
		"The fields that `--json` prints are in [json.md](json.md).")
	return b.String()
}

// statuses are the exit statuses and signals of all commands.
func statuses(root *cobra.Command) string {
	var b strings.Builder
	b.WriteString("## Exit statuses\n\n| command | 0 | 1 |\n|---|---|---|\n")
	for _, c := range documented(root) {
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", c.CommandPath(), manuals[nameOf(c)].does, manuals[nameOf(c)].fails)
	}
	b.WriteString("\n2, of every command: " + badUsage + ".\n\n## Signals\n\n| command | signal | |\n|---|---|---|\n")
	for _, c := range documented(root) {
		for _, s := range manuals[nameOf(c)].signals {
			fmt.Fprintf(&b, "| `%s` | %s | %s |\n", c.CommandPath(), s[0], s[1])
		}
	}
	b.WriteString("\nAll other commands are ended by SIGINT and SIGTERM, as usual.")
	return b.String()
}

// general is what holds for all commands.
func general(root *cobra.Command) *reference.Page {
	p := &reference.Page{}
	m := manuals[""]
	p.Heading(1, "Files")
	p.Items(m.files)
	p.Heading(1, "Environment")
	p.Items(m.environment)
	return p
}

func rootPage(root *cobra.Command) *reference.Page {
	p := &reference.Page{}
	synopsis(p, "tailsplice COMMAND [OPTIONS]\ntailsplice --version [--json]\ntailsplice [COMMAND] --help")
	p.Heading(1, "Description")
	p.Text(root.Long)
	p.Heading(1, "Commands")
	var items [][2]string
	for _, c := range documented(root) {
		items = append(items, [2]string{"`" + strings.ReplaceAll(c.CommandPath(), " ", "-") + "(8)`", brief(c)})
	}
	p.Items(items)
	p.Heading(1, "Options")
	p.Items(append(options(root, nil), [2]string{"`-h, --help`", "print the help of a command"}))
	p.Append(general(root))
	exit(p, manuals[""])
	p.Heading(1, "Signals")
	p.Text("See `tailsplice-run(8)`.")
	examples(p, root)
	p.Man("SEE ALSO", "`tailsplice.yaml(5)`, `/usr/share/doc/tailsplice/docs`")
	return p
}

func commandPage(c *cobra.Command, m manual) *reference.Page {
	p := &reference.Page{Depth: 1}
	line := c.CommandPath() + " [OPTIONS]"
	if _, args, ok := strings.Cut(c.Use, " "); ok {
		line += " " + args
	}
	shared := c.Commands() // those that are described here
	if len(ownPages(c)) > 0 {
		shared = nil
	}
	if names := subcommands(shared); len(names) > 0 {
		line = c.CommandPath() + " " + strings.Join(names, "|") + " [OPTIONS]"
	}
	synopsis(p, line)
	p.Heading(1, "Description")
	p.Text(c.Long)
	if o := options(c, shared); len(o) > 0 {
		p.Heading(1, "Options")
		p.Items(o)
	}
	for _, section := range []struct {
		title string
		items [][2]string
	}{{"Files", m.files}, {"Environment", m.environment}} {
		if len(section.items) > 0 {
			p.Heading(1, section.title)
			p.Items(section.items)
		}
	}
	exit(p, m)
	if len(m.signals) > 0 {
		p.Heading(1, "Signals")
		p.Items(m.signals)
	}
	examples(p, c)
	see := "`tailsplice(8)`, `tailsplice.yaml(5)`"
	for _, name := range m.see {
		see += ", `tailsplice-" + name + "(8)`"
	}
	p.Man("SEE ALSO", see)
	return p
}

func synopsis(p *reference.Page, lines string) {
	p.Heading(1, "Synopsis")
	p.Code("", lines)
}

func exit(p *reference.Page, m manual) {
	p.Heading(1, "Exit status")
	p.Items([][2]string{{"0", m.does}, {"1", m.fails}, {"2", badUsage}})
}

func examples(p *reference.Page, c *cobra.Command) {
	var lines []string
	for line := range strings.SplitSeq(c.Example, "\n") {
		lines = append(lines, strings.TrimPrefix(line, "  "))
	}
	p.Heading(1, "Examples")
	p.Code("sh", strings.Join(lines, "\n"))
}

func subcommands(all []*cobra.Command) (names []string) {
	for _, sub := range all {
		if !sub.Hidden {
			names = append(names, sub.Name())
		}
	}
	return names
}

// options are those of a command and of those below it, each once.
func options(c *cobra.Command, more []*cobra.Command) (items [][2]string) {
	at := map[string]int{} // the place in items by the option's name
	for _, c := range append([]*cobra.Command{c}, more...) {
		c.LocalFlags().VisitAll(func(f *pflag.Flag) {
			if f.Hidden || f.Name == "help" {
				return
			}
			value, text := pflag.UnquoteUsage(f)
			term := "--" + f.Name
			if f.Shorthand != "" {
				term = "-" + f.Shorthand + ", " + term
			}
			if value != "" {
				term += " " + strings.ToUpper(value)
			}
			if d := strings.Trim(f.DefValue, "[]"); d != "" && d != "false" && d != "0" {
				text += " (default `" + d + "`)"
			}
			if i, ok := at[f.Name]; !ok {
				at[f.Name] = len(items)
				items = append(items, [2]string{"`" + term + "`", text})
			} else if items[i][1] != text {
				text, _, _ = strings.Cut(text, " (default")
				items[i][1] = text + " (each has a default of its own)"
			}
		})
	}
	return items
}

// TestWrongCommandLines: what the reference says of exit status 2 is so for each command.
func TestWrongCommandLines(t *testing.T) {
	var try func(c *cobra.Command)
	try = func(c *cobra.Command) {
		path := strings.Fields(c.CommandPath())[1:]
		for _, wrong := range [][]string{{"--nonsense"}, {"one", "too", "many"}} {
			if c.Name() == "help" || len(wrong) > 1 && strings.Contains(c.Use, "...") { // which takes any number
				continue
			}
			if status := execute(append(path, wrong...)); status != 2 {
				t.Errorf("tailsplice %s: exit status %d, want 2", strings.Join(append(path, wrong...), " "), status)
			}
		}
		for _, sub := range c.Commands() {
			try(sub)
		}
	}
	try(newRoot())
}
