package front

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestAccessLogReload(t *testing.T) {
	addr, app := freeAddr(t), headers(t)
	dir := t.TempDir()
	yaml := func(file string) string {
		return fmt.Sprintf(`
listeners: [{ listen: %q, mode: http, access_log: { file: %q }, default: { forward: %q } }]`, addr, filepath.Join(dir, file), app)
	}
	d := start(t, yaml("a.log"))
	get := func() { ask(t, addr, "GET", "a.test", "/x?y=z", nil, "User-Agent: \xc3\xa9") }
	has := func(file string, n int) func() bool {
		return func() bool {
			b, _ := os.ReadFile(filepath.Join(dir, file))
			return strings.Count(string(b), "\n") == n
		}
	}
	get()
	eventually(t, "a line", has("a.log", 1))
	b, _ := os.ReadFile(filepath.Join(dir, "a.log"))
	var line map[string]any
	if err := json.Unmarshal(b, &line); err != nil || line["uri"] != "/x?y=z" || line["client"] != "127.0.0.1" || line["status"] != 200.0 || line["target"] != app || line["request_id"] == nil {
		t.Errorf("%v: %s", err, b)
	}
	if err := d.Reload(parse(t, yaml("no/b.log"))); err == nil || !strings.Contains(err.Error(), "access_log") || !strings.Contains(err.Error(), "test.yaml:2:") {
		t.Errorf("a folder that is not there: %v", err)
	}
	get()
	eventually(t, "a line after the failed reload", has("a.log", 2))
	if err := d.Reload(parse(t, yaml("b.log"))); err != nil {
		t.Fatal(err)
	}
	get()
	eventually(t, "a line in the new file", has("b.log", 1))
	os.Rename(filepath.Join(dir, "b.log"), filepath.Join(dir, "b.log.1"))
	d.ReopenLogs()
	eventually(t, "the new file", has("b.log", 0))
	get()
	eventually(t, "a line in it", has("b.log", 1))
}
