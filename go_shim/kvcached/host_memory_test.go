package kvcached

import (
	"testing"
	"testing/fstest"
)

func TestDefaultHostLimit(t *testing.T) {
	const (
		memory = "MemTotal:       32768000 kB\nMemFree:        1 kB\n" // 31.25 GiB
		half   = 16000 << 20
		two    = "22 1 0:20 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
		one    = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
	)
	for _, test := range []struct {
		name  string
		files map[string]string
		want  uint64
	}{
		{"nothing is told", nil, NoLimit},
		{"no groups", map[string]string{"proc/meminfo": memory}, half},
		{"version 2 without a limit", map[string]string{
			"proc/meminfo": memory, "proc/self/cgroup": "0::/a/b\n", "proc/self/mountinfo": two, "sys/fs/cgroup/a/b/memory.max": "max\n",
		}, half},
		{"version 2", map[string]string{
			"proc/meminfo": memory, "proc/self/cgroup": "0::/a/b\n", "proc/self/mountinfo": two, "sys/fs/cgroup/a/b/memory.max": "8589934592\n",
		}, 4 << 30},
		{"version 2, limited further up", map[string]string{
			"proc/meminfo": memory, "proc/self/cgroup": "0::/a/b\n", "proc/self/mountinfo": two,
			"sys/fs/cgroup/a/b/memory.max": "8589934592\n", "sys/fs/cgroup/a/memory.max": "4294967296\n",
		}, 2 << 30},
		{"version 2 in a container", map[string]string{
			"proc/meminfo": memory, "proc/self/cgroup": "0::/\n", "proc/self/mountinfo": two, "sys/fs/cgroup/memory.max": "2147483648\n",
		}, 1 << 30},
		{"version 2 beside 1", map[string]string{
			"proc/meminfo": memory, "proc/self/cgroup": "4:memory:/x\n0::/y\n",
			"proc/self/mountinfo":                          one + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
			"sys/fs/cgroup/memory/x/memory.limit_in_bytes": "6442450944\n",
		}, 3 << 30},
		{"version 1 without a limit", map[string]string{
			"proc/meminfo": memory, "proc/self/cgroup": "9:name=systemd:/\n4:memory:/x\n", "proc/self/mountinfo": one,
			"sys/fs/cgroup/memory/x/memory.limit_in_bytes": "9223372036854771712\n",
		}, half},
		{"version 1 with two controllers in one mount, a container's part of the tree", map[string]string{
			"proc/meminfo": memory, "proc/self/cgroup": "4:cpu,memory:/docker/abc\n",
			"proc/self/mountinfo":                      "35 31 0:32 /docker/abc /sys/fs/cgroup/both rw - cgroup cgroup rw,cpu,memory\n",
			"sys/fs/cgroup/both/memory.limit_in_bytes": "3221225472\n",
		}, 1536 << 20},
		{"a mount of another part of the tree", map[string]string{
			"proc/meminfo": memory, "proc/self/cgroup": "0::/ab\n",
			"proc/self/mountinfo":        "22 1 0:20 /a /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
			"sys/fs/cgroup/b/memory.max": "4096\n",
		}, half},
		{"more than the machine has", map[string]string{
			"proc/meminfo": memory, "proc/self/cgroup": "0::/\n", "proc/self/mountinfo": two, "sys/fs/cgroup/memory.max": "1099511627776\n",
		}, half},
		{"hardly anything", map[string]string{
			"proc/meminfo": memory, "proc/self/cgroup": "0::/\n", "proc/self/mountinfo": two, "sys/fs/cgroup/memory.max": "4096\n",
		}, 1 << 20},
	} {
		t.Run(test.name, func(t *testing.T) {
			root := fstest.MapFS{}
			for name, text := range test.files {
				root[name] = &fstest.MapFile{Data: []byte(text)}
			}
			if got := defaultHostLimit(root); got != test.want {
				t.Errorf("%d, want %d", got, test.want)
			}
		})
	}
}
