package main

import (
	"context"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/tailsplice/tailsplice/userspace/server"
)

// completeTimeout bounds how long a shell waits at its prompt for names.
const completeTimeout = 2 * time.Second

// completes gives a shell the names that the daemon's status has, but for those that the command line has
// already. Where no daemon answers there are none.
func (a *asker) completes(names func(*server.Status) []string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		ctx, cancel := context.WithTimeout(cmd.Context(), completeTimeout)
		defer cancel()
		var s server.Status
		if len(args) > 0 || a.Get(ctx, "status", &s) != nil || printable(&s) != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		all := names(&s)
		slices.Sort(all)
		return slices.Compact(all), cobra.ShellCompDirectiveNoFileComp
	}
}

// newCompletion takes the place of cobra's own command, whose help and exit statuses are another program's.
func newCompletion() *cobra.Command {
	return &cobra.Command{
		Use:   "completion bash|zsh|fish",
		Short: "Print the completion script for a shell",
		Long: `Print the script with which a shell completes commands, options, file names, and
names of listeners and targets, for which it asks the daemon. The packages
install the scripts for bash, zsh and fish.`,
		Example: `  tailsplice completion bash >/etc/bash_completion.d/tailsplice
  tailsplice completion zsh >"${fpath[1]}/_tailsplice"
  tailsplice completion fish >~/.config/fish/completions/tailsplice.fish`,
		ValidArgs: []string{"bash", "zsh", "fish"},
		Args:      exactlyOne("name one shell: bash, zsh or fish"),
		RunE: func(cmd *cobra.Command, args []string) error {
			root, out := cmd.Root(), cmd.OutOrStdout()
			switch args[0] {
			case "zsh":
				return root.GenZshCompletion(out)
			case "fish":
				return root.GenFishCompletion(out, true)
			}
			return root.GenBashCompletionV2(out, true)
		},
	}
}
