// Command tailsplice accepts public connections, routes them by TLS server
// name without decrypting, and splices them into connections over a tailnet.
//
// This package reads flags, wires the packages together, and prints. It is the only place where loader and
// userspace meet, so it decides which kernel datapaths are loaded and when (datapaths.go).
//
// Its files:
//
//	main.go        the command line
//	run.go         run: the daemon's life, from the configuration to the last flow
//	upgrade.go     upgrade: another process takes over; reload
//	control.go     the control socket is bound again where its file was removed
//	program.go     whether another program is where this one was started from: reload upgrades then
//	signals.go     HUP, TERM and INT: reload, and drain before the daemon ends
//	outlive.go     a process that another one has taken over from lets its flows end
//	keep.go        what a service manager keeps for the process after a crash, and its watchdog
//	files_unix.go  the limit of open files
//	datapaths.go   the kernel's datapaths: what is loaded, and when
//	late.go        a datapath that can't be loaded yet
//	check.go       check
//	doctor.go      doctor
//	init.go        init
//	nouns.go       status, flows and reload
//	verbs.go       drain, undrain, flows kill, target, log
//	top.go         top
//	trace.go       trace
//	password.go    hash-password
//	completion.go  completion
//	printable.go   what strangers chose can't command a terminal
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
)

//go:generate go test -run IsCurrent$ -update .

// defaultConfig is where `make install` puts the configuration.
const defaultConfig = "/etc/tailsplice/tailsplice.yaml"

// defaultControl is config's default of control.socket.
const defaultControl = "/run/tailsplice/control.sock"

func main() { os.Exit(execute(os.Args[1:])) }

// errSilent ends the program with status 1 when all that there is to say has been said.
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
	var showVersion, asJSON bool
	root := &cobra.Command{
		Use:   "tailsplice",
		Short: "Your own Funnel: public connections spliced into your tailnet",
		Long: `tailsplice accepts public TCP connections on an edge server and forwards each
one over a tailnet. It reads the TLS server name to choose the target, and does
not decrypt the connection. The same program runs on every hop of the path: on
the edge, on the server that terminates TLS, and on the machine that answers.`,
		Example: `  # write a first configuration for an edge, check it, and run it
  tailsplice init edge --names example.org --config edge.yaml
  tailsplice check --config edge.yaml
  sudo tailsplice run --config edge.yaml`,
		SilenceUsage:               true,
		SilenceErrors:              true,
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
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case showVersion:
				return printVersion(cmd.OutOrStdout(), asJSON)
			case asJSON:
				return &usageError{errors.New("--json needs a command, or --version")}
			}
			return cmd.Help()
		},
	}
	root.Flags().BoolVarP(&showVersion, "version", "v", false, "print the version, as the command version does")
	root.Flags().BoolVar(&asJSON, "json", false, "with --version: print JSON")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err} })
	root.AddCommand(newRun(), newCheck(), newStatus(), newFlows(), newTrace(), newTop(), newDoctor(), newInit(),
		newDrain(), newUndrain(), newTarget(), newLog(), newReload(), newUpgrade(), newHashPassword(), newCompletion(), newVersion())
	return root
}

func noArgs(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return &usageError{fmt.Errorf("unexpected argument %q", args[0])}
	}
	return nil
}

// exactlyOne refuses all but one argument, which is one of the command's ValidArgs if it has some.
func exactlyOne(help string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 || cobra.OnlyValidArgs(cmd, args) != nil {
			return &usageError{errors.New(help)}
		}
		return nil
	}
}

func configFlag(cmd *cobra.Command, file *string) {
	cmd.Flags().StringVarP(file, "config", "c", defaultConfig, "the configuration `file`")
	cmd.MarkFlagFilename("config", "yaml", "yml")
}

func controlFlag(cmd *cobra.Command, socket *string) {
	cmd.Flags().StringVar(socket, "control", defaultControl, "the control `socket` of the daemon, which its configuration names as control.socket")
}

func jsonFlag(cmd *cobra.Command, asJSON *bool) {
	cmd.Flags().BoolVar(asJSON, "json", false, "print JSON")
}

// show prints v, a pointer: as JSON, or by people, once all texts in v are printable.
func show(cmd *cobra.Command, asJSON bool, v any, people func(io.Writer)) error {
	if asJSON {
		return printJSON(cmd, v)
	}
	if err := printable(v); err != nil {
		return err
	}
	people(cmd.OutOrStdout())
	return nil
}

func printJSON(cmd *cobra.Command, v any) error {
	enc := json.NewEncoder(terminal{cmd.OutOrStdout()})
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}
