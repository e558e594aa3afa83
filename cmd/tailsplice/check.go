package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/tailsplice/tailsplice/userspace/config"
)

func newCheck() *cobra.Command {
	var file string
	var schema bool
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Check a configuration without running it",
		Long: `Check a configuration without running it. All that is wrong is printed at once,
each as FILE:LINE:COL: message, and the exit status is 1. Nothing is bound,
dialled or changed, so it can be used on any machine.`,
		Example: `  tailsplice check --config /etc/tailsplice/tailsplice.yaml
  tailsplice check --schema >tailsplice.schema.json   # for your editor`,
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
				fmt.Fprintf(os.Stderr, "warning: %s\n", w)
			}
			routes := 0
			for _, l := range cfg.Listeners {
				routes += len(l.Routes)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s is fine: node %s, %s, %s\n", file, cfg.Node, plural(len(cfg.Listeners), "listener"), plural(routes, "route"))
			return nil
		},
	}
	configFlag(cmd, &file)
	cmd.Flags().BoolVar(&schema, "schema", false, "print the configuration's JSON schema instead")
	return cmd
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
