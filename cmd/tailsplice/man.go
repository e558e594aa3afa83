package main

import (
	"errors"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// newMan writes the man pages, for `make install` and packagers.
func newMan() *cobra.Command {
	return &cobra.Command{
		Use:    "man DIR",
		Short:  "Write the man pages into a directory",
		Hidden: true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return &usageError{errors.New("name the directory, and nothing else")}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			for _, c := range cmd.Root().Commands() {
				if c.Name() == "completion" { // one page for all shells will do
					for _, shell := range c.Commands() {
						shell.Hidden = true
					}
				}
			}
			return doc.GenManTree(cmd.Root(), &doc.GenManHeader{Title: "TAILSPLICE", Section: "8", Source: "tailsplice"}, args[0])
		},
	}
}
