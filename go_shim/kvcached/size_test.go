package kvcached

import (
	"strings"
	"testing"
)

func TestParseSize(t *testing.T) {
	for _, test := range []struct {
		text, unit string
		want       uint64
	}{
		{"20", "GB", 20_000_000_000},
		{"0.5", "GB", 500_000_000},
		{"20GB", "", 20_000_000_000},
		{"20 gb", "", 20_000_000_000},
		{"1GiB", "GB", 1 << 30},
		{"1.5GiB", "", 3 << 29},
		{"250MB", "GB", 250_000_000},
		{"0.1MiB", "", 104857}, // 104857.6
		{"9223372036.854775807GB", "", 9223372036854775807},
		{"0.000000001", "GB", 1},
	} {
		got, err := ParseSize(test.text, test.unit)
		if err != nil || got != test.want {
			t.Errorf("ParseSize(%q, %q) = %d, %v; want %d", test.text, test.unit, got, err, test.want)
		}
	}
}

func TestParseSizeRefuses(t *testing.T) {
	for _, test := range []struct{ text, unit, want string }{
		{"", "GB", "not a size"},
		{"-1", "GB", "not a size"},
		{"+1", "GB", "not a size"},
		{"1e3", "GB", "unit"},
		{"0x10", "GB", "unit"},
		{".5", "GB", "not a size"},
		{"5.", "GB", "not a size"},
		{"1,5", "GB", "not a size"},
		{"NaN", "GB", "not a size"},
		{"twenty", "GB", "not a size"},
		{"20 G B", "GB", "not a size"},
		{"0", "GB", "less than one byte"},
		{"0.0000000001", "GB", "less than one byte"},
		{"9223372036.854775808GB", "", "larger than any memory"},
		{"99999999999999999999999", "GB", "larger than any memory"},
		{"20", "", "has no unit: write 20GB"},
		{"20TB", "GB", `unknown unit "TB"`},
		{"20kB", "", `unknown unit "kB"`},
		{"20GB20", "", "not a size"},
	} {
		got, err := ParseSize(test.text, test.unit)
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("ParseSize(%q, %q) = %d, %v; want an error with %q", test.text, test.unit, got, err, test.want)
		}
	}
}

func TestFormatSize(t *testing.T) {
	for n, want := range map[uint64]string{
		0:              "0 bytes",
		999:            "999 bytes",
		1000:           "1 kB",
		1001:           "1.01 kB",
		5_242_880:      "5.25 MB",
		20_000_000_000: "20 GB",
		1_500_000_000:  "1.5 GB",
		1_999_999_999:  "2 GB",
		100_000:        "100 kB",
	} {
		if got := FormatSize(n); got != want {
			t.Errorf("FormatSize(%d) = %q, want %q", n, got, want)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	for _, seed := range []string{"20GB", "1.5", "x", "9999999999999999999999GiB", "0.0MB"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if n, err := ParseSize(text, "GB"); err == nil && (n == 0 || n > 1<<63-1) {
			t.Errorf("ParseSize(%q) = %d", text, n)
		}
	})
}
