package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"reflect"
	"strings"
)

// MaxFileBytes is the size of the largest configuration file that is read: twice what 100,000 routes take.
const MaxFileBytes = 16 << 20

// Load reads, parses and checks a configuration file. An unreadable file is one error that wraps the
// operating system's; wrong contents are Errors, as with Parse.
func Load(file string) (*Config, error) {
	data, err := read(file)
	if err != nil {
		return nil, err
	}
	return Parse(file, data)
}

func read(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, explain(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, explain(err)
	}
	if st.IsDir() {
		return nil, fmt.Errorf("read configuration %s: it is a folder, name a file in it", file)
	}
	// One byte more than allowed lets Parse report that it is too much.
	data, err := io.ReadAll(io.LimitReader(f, MaxFileBytes+1))
	if err != nil {
		return nil, explain(err)
	}
	return data, nil
}

// explain adds to an error of the file system what can be done about it.
func explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("read configuration: %w; name the file with --config", err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("read configuration: %w; run as a user who may read it", err)
	}
	return fmt.Errorf("read configuration: %w", err)
}

// Parse reads a configuration from memory. The file's name is for messages, and relative paths in the
// configuration start at its folder. Variables are those of this process's environment. The error is Errors:
// everything that is wrong, in the order of the file.
func Parse(file string, data []byte) (*Config, error) {
	r := &reporter{file: file}
	c := &Config{File: file}
	if root := parseTree(r, data); root != nil {
		if text := string(data); strings.Contains(text, "${") {
			lines := strings.Split(strings.TrimPrefix(text, "\ufeff"), "\n")
			x := expander{reporter: r, lines: lines, lookup: os.LookupEnv}
			x.expand(root)
		}
		d := &decoder{reporter: r, fields: map[reflect.Type][]field{}}
		d.root(root, c)
		v := &validator{reporter: r, bound: map[uint16][]bound{}, announced: map[string]Pos{}}
		v.config(c)
	}
	if len(r.errs) > 0 {
		return nil, Errors(sorted(r.errs))
	}
	c.Warnings = sorted(r.warnings)
	return c, nil
}
