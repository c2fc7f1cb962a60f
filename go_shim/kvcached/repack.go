package kvcached

import (
	"os"
	"slices"
	"strings"
	"sync"
)

// CPU is what decides which weights llama.cpp's CPU backend keeps in a layout of its own. Those it allocates itself, outside
// the library, also where it maps no file.
type CPU struct {
	AVX2, AVX512, AMX bool // x86
	DotProduct        bool // Arm
}

// ThisCPU is that of this machine; where the system does not tell, one that repacks nothing.
var ThisCPU = sync.OnceValue(func() CPU {
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return CPU{}
	}
	return cpuOf(string(text))
})

// cpuOf reads the first processor of a text as in /proc/cpuinfo.
func cpuOf(text string) CPU {
	for _, line := range strings.Split(text, "\n") {
		name, value, _ := strings.Cut(line, ":")
		if name = strings.TrimSpace(name); name != "flags" && name != "Features" {
			continue
		}
		flags := strings.Fields(value)
		has := func(flag string) bool { return slices.Contains(flags, flag) }
		return CPU{AVX2: has("avx2"), AVX512: has("avx512f"), AMX: has("amx_int8"), DotProduct: has("asimddp")}
	}
	return CPU{}
}

// Repacks says whether a weight of this type, with rows of columns elements (of each expert, where there are several), is
// kept in another layout. It follows llama.cpp's choice of August 2026 and is a prediction: others know more types.
func (c CPU) Repacks(tensorType string, columns, rows uint64, experts bool) bool {
	is := func(types ...string) bool { return slices.Contains(types, tensorType) }
	switch {
	case c.AMX && !experts && columns%32 == 0 && rows%32 == 0 && is("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"):
		return true
	case c.AVX2 && is("Q4_0", "Q4_K", "IQ4_NL", "MXFP4"), c.AVX512 && is("Q2_K"):
		return rows%8 == 0
	case c.DotProduct && is("Q4_0", "Q8_0", "IQ4_NL", "MXFP4"):
		return rows%4 == 0
	case c.DotProduct && is("Q4_K", "Q5_K", "Q6_K"):
		return rows%8 == 0
	}
	return false
}
