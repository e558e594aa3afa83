package memory

import (
	"os"
	"path/filepath"
	"testing"
)

// TestAvailable: the least that the machine, or a cgroup on the way to ours, may have.
func TestAvailable(t *testing.T) {
	for _, v := range []struct {
		name, groups string
		files        map[string]string
		want         int64
	}{
		{"no cgroup", "", nil, 1000 << 10},
		{"nothing is known", "", map[string]string{"proc/meminfo": ""}, 0},
		{"version 2, no limit", "0::/a/b\n", map[string]string{"cgroup/a/b/memory.max": "max\n"}, 1000 << 10},
		{"version 2, a limit further up", "0::/a/b\n",
			map[string]string{"cgroup/a/b/memory.max": "900000\n", "cgroup/a/memory.max": "500000\n"}, 500000},
		{"version 2, the path of the host", "0::/a/b\n", map[string]string{"cgroup/memory.max": "400000\n"}, 400000},
		{"version 1", "5:memory:/a\n1:cpu:/b\n",
			map[string]string{"cgroup/memory/a/memory.limit_in_bytes": "300000\n", "cgroup/cpu/b/memory.max": "7"}, 300000},
		{"version 1, no limit", "5:memory:/a\n",
			map[string]string{"cgroup/memory/a/memory.limit_in_bytes": "9223372036854771712\n"}, 1000 << 10},
	} {
		t.Run(v.name, func(t *testing.T) {
			dir := t.TempDir()
			files := map[string]string{"proc/meminfo": "MemTotal:        1000 kB\nMemFree: 1 kB\n", "proc/self/cgroup": v.groups}
			for name, text := range v.files {
				files[name] = text
			}
			for name, text := range files {
				name = filepath.Join(dir, name)
				if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if n := available(filepath.Join(dir, "proc"), filepath.Join(dir, "cgroup")); n != v.want {
				t.Errorf("%d bytes, want %d", n, v.want)
			}
		})
	}
}

// TestCgroupSockets: the cgroup of the process says what its sockets hold, and no other one does.
func TestCgroupSockets(t *testing.T) {
	const stat = "anon 5\nsock 4096\nshmem 7\n"
	for _, v := range []struct {
		name, groups, file, stat string
		want                     int64
		ok                       bool
	}{
		{"its own", "0::/a/b\n", "a/b", stat, 4096, true},
		{"the path of the host", "0::/a/b\n", "", stat, 4096, true},
		{"another's", "0::/a/b\n", "a/c", stat, 0, false},
		{"no word of sockets", "0::/a\n", "a", "anon 5\n", 0, false},
		{"version 1", "5:memory:/a\n", "memory/a", stat, 0, false},
		{"none", "", "a", stat, 0, false},
		{"the root of the machine", "0::/\n", "", stat, 0, false},
		{"sockets are not charged", "0::/a\n", "a", "sock 0\n", 0, false},
	} {
		dir := t.TempDir()
		files := map[string]string{"proc/self/cgroup": v.groups, "cgroup/" + v.file + "/memory.stat": v.stat}
		if v.name != "the root of the machine" {
			files["cgroup/"+v.file+"/memory.max"] = "max\n"
		}
		for name, text := range files {
			name = filepath.Join(dir, name)
			if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		n, ok := cgroupSockets(filepath.Join(dir, "proc"), filepath.Join(dir, "cgroup"))
		if n != v.want || ok != v.ok {
			t.Errorf("%s: %d, %v, want %d, %v", v.name, n, ok, v.want, v.ok)
		}
	}
}
