package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tailsplice/tailsplice/userspace/admin"
	"github.com/tailsplice/tailsplice/userspace/config"
	"github.com/tailsplice/tailsplice/userspace/plan"
	"github.com/tailsplice/tailsplice/userspace/server"
)

func newCheck() *cobra.Command {
	var file string
	var schema, here bool
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Check a configuration without running it",
		Long: `Check a configuration without running it. All errors are printed, each as
FILE:LINE:COL: message, and the exit status is 1 if there are any. The command
opens no port, connects to nothing and changes nothing, so it works on any
machine. At the end it counts what the configuration needs of the machine it is
for, such as files and ports, and what it therefore did not check.

With --here it checks these as well, on this machine and as the current user:
files exist and can be used, ports are free or belong to the running daemon,
and tailscaled, dockerd and the name server know the nodes, containers and
hosts. Each port is bound for a moment. Targets are not connected to; that is
what tailsplice trace does.`,
		Example: `  tailsplice check --config /etc/tailsplice/tailsplice.yaml
  sudo tailsplice check --here
  tailsplice check --schema >tailsplice.schema.json   # for editors`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if schema {
				_, err := cmd.OutOrStdout().Write(config.Schema())
				return err
			}
			cfg, err := loadConfig(file)
			if err != nil {
				return err
			}
			for _, w := range cfg.Warnings {
				fmt.Fprintf(terminal{os.Stderr}, "warning: %s\n", w)
			}
			routes := 0
			for _, l := range cfg.Listeners {
				routes += len(l.Routes)
			}
			sum := fmt.Sprintf("%s is fine: node %s, %s, %s\n", file, cfg.Node, plural(len(cfg.Listeners), "listener"), plural(routes, "route"))
			things := plan.NeedsOf(cfg).Things
			if !here {
				fmt.Fprint(cmd.OutOrStdout(), sum)
				if len(things) > 0 {
					fmt.Fprintf(cmd.OutOrStdout(), "not looked at: %s; with --here they are, on the machine that it is for\n", count(things))
				}
				return nil
			}
			problems := server.LookHere(cmd.Context(), cfg, running(cmd.Context(), cfg))
			for _, p := range problems {
				fmt.Fprintln(terminal{os.Stderr}, p)
			}
			if len(problems) > 0 {
				return errSilent
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%slooked at on this machine: %s\n", sum, cmp.Or(count(things), "nothing, it needs nothing"))
			return nil
		},
	}
	configFlag(cmd, &file)
	cmd.Flags().BoolVar(&schema, "schema", false, "print the JSON schema of configurations, and check nothing")
	cmd.Flags().BoolVar(&here, "here", false, "also check what the configuration needs of this machine: files, ports, nodes, containers")
	return cmd
}

// count says how many there are of each kind, as "2 files, 1 port".
func count(things []plan.Thing) string {
	var out []string
	for _, kind := range plan.ThingKinds {
		n := 0
		for _, t := range things {
			if t.Kind == kind {
				n++
			}
		}
		if n > 0 {
			out = append(out, plural(n, kind))
		}
	}
	return strings.Join(out, ", ")
}

// running is the status of the daemon that a configuration would be the one of, or nil where none runs.
func running(ctx context.Context, cfg *config.Config) *server.Status {
	ctx, cancel := context.WithTimeout(ctx, askPatience)
	defer cancel()
	var s server.Status
	if err := (admin.Client{Socket: cfg.Control.Socket}).Get(ctx, "status", &s); err != nil {
		return nil
	}
	return &s
}

// loadConfig reads file; what is wrong with it goes to standard error as it
// is, one line each, so that editors can jump to it.
func loadConfig(file string) (*config.Config, error) {
	cfg, err := config.Load(file)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return nil, errSilent
	}
	return cfg, nil
}

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
