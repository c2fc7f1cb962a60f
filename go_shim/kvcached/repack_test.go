package kvcached

import "testing"

func TestCPUOfAText(t *testing.T) {
	for text, want := range map[string]CPU{
		"":                                       {},
		"processor\t: 0\nflags\t\t: fpu avx2x\n": {},
		"processor\t: 0\nflags\t\t: fpu avx2 avx512f\nbugs: amx_int8\n\nprocessor\t: 1\nflags: amx_int8\n": {AVX2: true, AVX512: true},
		"flags\t: avx2 avx512f amx_int8":            {AVX2: true, AVX512: true, AMX: true},
		"Features\t: fp asimd asimddp\nCPU: avx2\n": {DotProduct: true},
	} {
		if got := cpuOf(text); got != want {
			t.Errorf("%q: %+v, want %+v", text, got, want)
		}
	}
}

func TestRepacks(t *testing.T) {
	for _, c := range []struct {
		cpu           CPU
		tensorType    string
		columns, rows uint64
		experts, want bool
	}{
		{CPU{}, "Q4_0", 256, 256, false, false},
		{CPU{AVX2: true}, "Q4_0", 256, 8, false, true},
		{CPU{AVX2: true}, "Q4_K", 256, 8, true, true},
		{CPU{AVX2: true}, "Q4_K", 256, 12, false, false},
		{CPU{AVX2: true}, "Q2_K", 256, 8, false, false},
		{CPU{AVX2: true, AVX512: true}, "Q2_K", 256, 8, false, true},
		{CPU{AVX2: true}, "Q8_0", 256, 256, false, false},
		{CPU{AVX2: true}, "F16", 256, 256, false, false},
		{CPU{AVX2: true, AMX: true}, "Q8_0", 256, 64, false, true},
		{CPU{AVX2: true, AMX: true}, "Q8_0", 256, 64, true, false},
		{CPU{AVX2: true, AMX: true}, "Q8_0", 256, 8, false, false},
		{CPU{AVX2: true, AMX: true}, "Q4_0", 256, 8, false, true},
		{CPU{DotProduct: true}, "Q8_0", 256, 4, false, true},
		{CPU{DotProduct: true}, "Q6_K", 256, 4, false, false},
		{CPU{DotProduct: true}, "Q6_K", 256, 8, false, true},
	} {
		if got := c.cpu.Repacks(c.tensorType, c.columns, c.rows, c.experts); got != c.want {
			t.Errorf("%+v: %v", c, got)
		}
	}
}
