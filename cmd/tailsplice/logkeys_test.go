package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/tailsplice/tailsplice/test/reference"
)

// TestLogKeys: the keys of log lines are those of docs/reference/json.md.
func TestLogKeys(t *testing.T) {
	used := map[string]string{} // the place of one use, by key
	files := token.NewFileSet()
	for _, dir := range []string{"../../cmd", "../../userspace", "../../loader"} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") ||
				strings.Contains(path, "relaytest") {
				return err
			}
			file, err := parser.ParseFile(files, path, nil, 0)
			if err != nil {
				return err
			}
			ast.Inspect(file, func(n ast.Node) bool {
				if call, ok := n.(*ast.CallExpr); ok {
					for _, key := range logKeys(call) {
						used[key] = files.Position(call.Pos()).String()
					}
				}
				return true
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(used) < 30 {
		t.Fatalf("only %d keys were seen", len(used))
	}
	have := reference.Keys(t, "Log lines")
	for key, place := range used {
		if !slices.Contains(have, key) {
			t.Errorf("%s: a log line has the new key %q. If none of those in docs/reference/json.md will do, add a row to "+
				"its table \"Log lines\":\n| `%[2]s` | string | optional | ? |", place, key)
		}
	}
	for _, key := range have {
		if used[key] == "" && !slices.Contains([]string{"time", "level", "msg", "format_version", "omitted"}, key) {
			t.Errorf("docs/reference/json.md has the key %q of log lines, and none has it: remove the row, and raise format_version",
				key)
		}
	}
}

// logKeys are the keys of a call that logs: log.Info("text", "key", value), or slog.String("key", value).
func logKeys(call *ast.CallExpr) (keys []string) {
	method, ok := call.Fun.(*ast.SelectorExpr)
	first := 1 // the first key, behind the text
	switch {
	case !ok:
		if name, ok := call.Fun.(*ast.Ident); !ok || name.Name != "duration" {
			return nil
		}
		return text(call.Args, 0, 1)
	case isNamed(method.X, "slog") && slices.Contains([]string{"String", "Int", "Int64", "Float64", "Any", "Bool"}, method.Sel.Name):
		return text(call.Args, 0, 1)
	case method.Sel.Name == "noteRefused":
		first = 3
	case !slices.Contains([]string{"Debug", "Info", "Warn", "Error"}, method.Sel.Name):
		return nil
	case isNamed(method.X, "limited"):
		first = 2
	case !isNamed(method.X, "log", "Log", "w"):
		return nil
	}
	return text(call.Args, first, len(call.Args))
}

// isNamed says whether the last name of an expression is one of these: f.opts.Log, logger(w).
func isNamed(e ast.Expr, names ...string) bool {
	switch e := e.(type) {
	case *ast.Ident:
		return slices.Contains(names, e.Name)
	case *ast.SelectorExpr:
		return slices.Contains(names, e.Sel.Name)
	case *ast.CallExpr:
		return len(e.Args) == 1 && isNamed(e.Args[0], names...)
	}
	return false
}

// text is every second argument from first on, where it is a string that is written out.
func text(args []ast.Expr, first, end int) (out []string) {
	for i := first; i < end && i < len(args); i += 2 {
		if lit, ok := args[i].(*ast.BasicLit); ok && lit.Kind == token.STRING {
			if s, err := strconv.Unquote(lit.Value); err == nil {
				out = append(out, s)
			}
		}
	}
	return out
}
