// Command tailsplice accepts public connections, routes them by TLS server
// name without decrypting, and splices them into connections over a tailnet.
//
// This package reads flags, wires the packages together, and prints. It is the
// only place where loader and userspace meet, so it decides which kernel
// datapaths are loaded and when (datapaths.go).
package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
)

// defaultConfig is where `make install` puts the configuration.
const defaultConfig = "/etc/tailsplice/tailsplice.yaml"

// defaultControl is config's default of control.socket.
const defaultControl = "/run/tailsplice/control.sock"

func main() {
	os.Exit(execute(os.Args[1:]))
}

// errSilent ends the program with status 1 when all that there is to say has
// been said.
var errSilent = errors.New("")

// execute runs the command line and returns the exit status: 0 all went well,
// 1 it did not, 2 the command line is wrong.
func execute(args []string) int {
	root := newRoot()
	root.SetArgs(args)
	cmd, err := root.ExecuteC()
	var usage *usageError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &usage):
		fmt.Fprintf(terminal{os.Stderr}, "tailsplice: %v\n%s --help shows how it is used\n", err, cmd.CommandPath())
		return 2
	case !errors.Is(err, errSilent):
		fmt.Fprintf(terminal{os.Stderr}, "tailsplice: %v\n", err)
	}
	return 1
}

// usageError marks errors of the command line itself.
type usageError struct{ error }

func (e *usageError) Unwrap() error { return e.error }

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "tailsplice",
		Short: "Your own Funnel: public connections spliced into your tailnet",
		Long: `tailsplice takes public TCP connections on a cheap edge server, decides by the
TLS server name where each belongs, without decrypting, and splices it into a
connection over the tailnet. The same program runs on every hop of the way.`,
		Example: `  # an edge in four lines
  printf '%s\n' 'listeners:' '  - listen: [":443"]' '    mode: sni' '    default: { forward: tailnet://home:443 }' >edge.yaml
  tailsplice check --config edge.yaml
  tailsplice run --config edge.yaml`,
		SilenceUsage:               true,
		SilenceErrors:              true,
		CompletionOptions:          cobra.CompletionOptions{HiddenDefaultCmd: false},
		SuggestionsMinimumDistance: 2, // typing mistakes in a name
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			nearest := ""
			if names := cmd.SuggestionsFor(args[0]); len(names) > 0 {
				nearest = ", did you mean " + strings.Join(names, " or ") + "?"
			}
			return &usageError{fmt.Errorf("there is no command %q%s", args[0], nearest)}
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.Version = version() // makes --version
	root.SetVersionTemplate(versionLine() + "\n")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err} })
	root.AddCommand(newRun(), newCheck(), newStatus(), newFlows(), newTrace(), newTop(), newDoctor(), newInit(), newReload(), newHashPassword(), newVersion(), newMan())
	return root
}

// noArgs refuses arguments, as a usage error.
func noArgs(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return &usageError{fmt.Errorf("unexpected argument %q", args[0])}
	}
	return nil
}

// configFlag adds --config.
func configFlag(cmd *cobra.Command, file *string) {
	cmd.Flags().StringVarP(file, "config", "c", defaultConfig, "the configuration `file`")
	cmd.MarkFlagFilename("config", "yaml", "yml")
}

// controlFlag adds --control.
func controlFlag(cmd *cobra.Command, socket *string) {
	cmd.Flags().StringVar(socket, "control", defaultControl, "the daemon's control `socket` (control.socket in its configuration)")
}

// jsonFlag adds --json.
func jsonFlag(cmd *cobra.Command, asJSON *bool) {
	cmd.Flags().BoolVar(asJSON, "json", false, "print JSON, for machines")
}
