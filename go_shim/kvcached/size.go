package kvcached

import (
	"fmt"
	"math"
	"math/big"
	"regexp"
	"strconv"
	"strings"
)

// NoLimit as a limit means that there is none.
const NoLimit = uint64(math.MaxUint64)

var sizePattern = regexp.MustCompile(`^([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)$`)

var sizeUnits = map[string]int64{
	"mb":  1e6,
	"gb":  1e9,
	"mib": 1 << 20,
	"gib": 1 << 30,
}

// ParseSize reads a decimal number with a unit: MB and GB are 10^6 and 10^9 bytes, MiB and GiB 2^20 and 2^30, in either
// case. bareUnit is the unit of a number that has none; with "" such a number is refused. A fraction of a byte is
// dropped. The error says what is wrong, not where the text came from.
func ParseSize(text, bareUnit string) (uint64, error) {
	match := sizePattern.FindStringSubmatch(text)
	if match == nil {
		return 0, fmt.Errorf("%q is not a size: write a positive number and a unit, such as 20GB, 1.5GB or 512MiB", text)
	}

	unit := match[2]
	if unit == "" {
		unit = bareUnit
	}
	if unit == "" {
		return 0, fmt.Errorf("%q has no unit: write %sGB (10^9 bytes) or %sGiB (2^30 bytes)", text, match[1], match[1])
	}
	scale, ok := sizeUnits[strings.ToLower(unit)]
	if !ok {
		return 0, fmt.Errorf("%q has the unknown unit %q: use MB, GB (powers of 10), MiB or GiB (powers of 2)", text, unit)
	}

	number, ok := new(big.Rat).SetString(match[1])
	if !ok {
		return 0, fmt.Errorf("%q is not a number", match[1])
	}
	number.Mul(number, new(big.Rat).SetInt64(scale))
	bytes := new(big.Int).Quo(number.Num(), number.Denom())
	switch {
	case bytes.Sign() == 0:
		return 0, fmt.Errorf("%q is less than one byte: write more, or leave the setting out for its default", text)
	case !bytes.IsInt64():
		return 0, fmt.Errorf("%q is larger than any memory", text)
	}
	return bytes.Uint64(), nil
}

// FormatSize writes n in the largest of bytes, kB, MB and GB (powers of 10) that it reaches, to two decimals rounded up,
// so that what is shown as needed is never less than what is needed.
func FormatSize(n uint64) string {
	for _, unit := range []struct {
		name string
		size uint64
	}{{"GB", 1e9}, {"MB", 1e6}, {"kB", 1e3}} {
		if n < unit.size {
			continue
		}
		hundredths := n / (unit.size / 100)
		if n%(unit.size/100) != 0 {
			hundredths++
		}
		text := fmt.Sprintf("%d.%02d", hundredths/100, hundredths%100)
		return strings.TrimSuffix(strings.TrimRight(text, "0"), ".") + " " + unit.name
	}
	return strconv.FormatUint(n, 10) + " bytes"
}
