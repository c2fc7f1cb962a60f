package kvcached

import (
	"bufio"
	"io/fs"
	"path"
	"strconv"
	"strings"
)

// defaultHostLimit is half of the memory that this process may use: of the machine's, or of what its control groups (version 1
// or 2) allow where that is less; in whole MiB. NoLimit where the system does not tell. root is the file system from / on.
func defaultHostLimit(root fs.FS) uint64 {
	available := uint64(NoLimit)
	eachLine(root, "proc/meminfo", func(line string) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == "MemTotal:" {
			if kib, err := strconv.ParseUint(fields[1], 10, 54); err == nil {
				available = kib << 10
			}
		}
	})
	available = min(available, cgroupLimit(root))
	if available == NoLimit {
		return NoLimit
	}
	return max(available/2>>20, 1) << 20
}

// cgroupLimit is the least limit of this process's control groups and of those that they are in, as far as they can be seen.
func cgroupLimit(root fs.FS) uint64 {
	groups := map[string]string{} // by controller, "" for version 2
	eachLine(root, "proc/self/cgroup", func(line string) {
		if fields := strings.SplitN(line, ":", 3); len(fields) == 3 {
			for _, controller := range strings.Split(fields[1], ",") {
				groups[controller] = fields[2]
			}
		}
	})
	limit := uint64(NoLimit)
	eachLine(root, "proc/self/mountinfo", func(line string) {
		mount, super, ok := strings.Cut(line, " - ")
		fields, kind := strings.Fields(mount), strings.Fields(super)
		if !ok || len(fields) < 5 || len(kind) < 3 {
			return
		}
		var group, file string
		switch {
		case kind[0] == "cgroup2":
			group, file = groups[""], "memory.max"
		case kind[0] == "cgroup" && hasOption(kind[2], "memory"):
			group, file = groups["memory"], "memory.limit_in_bytes"
		default:
			return
		}
		// The mount may show a part of the tree only, such as a container's own.
		within, ok := strings.CutPrefix(group, strings.TrimSuffix(fields[3], "/"))
		if !ok || group == "" || within != "" && within[0] != '/' {
			within = "/"
		}
		for folder := path.Clean("/" + within); ; folder = path.Dir(folder) {
			data, err := fs.ReadFile(root, strings.TrimPrefix(path.Join(fields[4], folder, file), "/"))
			if n, parseErr := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64); err == nil && parseErr == nil {
				limit = min(limit, n) // "max", and a number near 2^63, mean none
			}
			if folder == "/" {
				return
			}
		}
	})
	return limit
}

func hasOption(options, name string) bool {
	for _, option := range strings.Split(options, ",") {
		if option == name {
			return true
		}
	}
	return false
}

// eachLine reads a file that may be missing.
func eachLine(root fs.FS, name string, use func(line string)) {
	file, err := root.Open(name)
	if err != nil {
		return
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		use(lines.Text())
	}
}
