package main

import "github.com/spf13/cobra"

// newCompletion takes the place of cobra's own command, whose help and exit statuses are another program's.
func newCompletion() *cobra.Command {
	return &cobra.Command{
		Use:   "completion bash|zsh|fish",
		Short: "Print the completion script for a shell",
		Long: `Print the script with which a shell completes commands, options and file names
of tailsplice. The packages install the scripts for bash, zsh and fish.`,
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
