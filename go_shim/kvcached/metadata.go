package kvcached

import (
	"fmt"
	"reflect"
	"slices"
)

// Metadata gives the value of a key of a model's file, such as "llama.block_count": a number, a bool, a string or a slice of
// numbers or bools of any type; nil where the file does not have it.
type Metadata func(key string) any

// fields reads one architecture's keys. The first thing that is wrong stays in err; what is read after it means nothing.
type fields struct {
	values Metadata
	arch   string // as llama.cpp reads the file
	prefix string // as the file says
	err    error
}

func openKeys(values Metadata) *fields {
	prefix, _ := values("general.architecture").(string)
	k := &fields{values: values, arch: prefix, prefix: prefix}
	if prefix == "" {
		k.fail("the file does not say of which architecture it is")
	}
	if renamed := archRenamed[prefix]; renamed != "" {
		k.arch = renamed
	}
	return k
}

func (k *fields) fail(format string, arguments ...any) {
	if k.err == nil {
		k.err = fmt.Errorf(format, arguments...)
	}
}

// raw is a key's value, after what Ollama's llama-server changes in files that only Ollama has written.
func (k *fields) raw(key string) any {
	value := func(key string) any { return k.values(k.prefix + "." + key) }
	if k.prefix == "glm4moelite" {
		// Its lengths are those of heads; deepseek2's are those of the compressed row, with one head.
		switch key {
		case "attention.head_count_kv":
			return 1
		case "attention.key_length":
			if rank, rope := value("attention.kv_lora_rank"), value("rope.dimension_count"); rank != nil && rope != nil {
				return k.number(rank, key) + k.number(rope, key)
			}
		case "attention.value_length":
			if rank := value("attention.kv_lora_rank"); rank != nil {
				return rank
			}
		case "attention.key_length_mla", "attention.value_length_mla":
			return value("attention.key_length")
		}
	}
	found := value(key)
	if key == "attention.head_count_kv" && recurrentInterval[k.arch] > 0 && k.arch != "minimax-01" {
		if heads, ok := numbers(found); ok && len(heads) > 0 {
			return max(slices.Max(heads), 0)
		}
	}
	return found
}

func (k *fields) has(key string) bool { return k.raw(key) != nil }

// get is a key's number, or otherwise without it.
func (k *fields) get(key string, otherwise uint64) uint64 {
	value := k.raw(key)
	if value == nil {
		return otherwise
	}
	return k.number(value, key)
}

// need is the number of a key that llama.cpp does not load the file without.
func (k *fields) need(key string) uint64 {
	value := k.raw(key)
	if value == nil {
		k.fail("the file has no key %s.%s", k.prefix, key)
		return 0
	}
	return k.number(value, key)
}

func (k *fields) number(value any, key string) uint64 {
	n, ok := number(reflect.ValueOf(value))
	if !ok || n < 0 {
		k.fail("the file's %s.%s is no number that can be one: %v", k.prefix, key, value)
		return 0
	}
	return uint64(n)
}

// perLayer is a number a layer, of a key that holds one for each or one for all.
func (k *fields) perLayer(key string, count int, otherwise []uint64) []uint64 {
	value := k.raw(key)
	if value == nil {
		return otherwise
	}
	list, ok := numbers(value)
	if !ok {
		return slices.Repeat([]uint64{k.number(value, key)}, count)
	}
	if len(list) != count {
		k.fail("the file's %s.%s has %d entries for %d layers", k.prefix, key, len(list), count)
		return make([]uint64, count)
	}
	for _, n := range list {
		if n < 0 {
			k.fail("the file's %s.%s has the entry %d", k.prefix, key, n)
		}
	}
	result := make([]uint64, count)
	for i, n := range list {
		result[i] = uint64(n)
	}
	return result
}

// flags is perLayer of bools.
func (k *fields) flags(key string, count int) []bool {
	flags := make([]bool, count)
	for i, n := range k.perLayer(key, count, make([]uint64, count)) {
		flags[i] = n != 0
	}
	return flags
}

func isList(value any) bool { return value != nil && reflect.ValueOf(value).Kind() == reflect.Slice }

func numbers(value any) ([]int64, bool) {
	if !isList(value) {
		return nil, false
	}
	list := reflect.ValueOf(value)
	result := make([]int64, list.Len())
	for i := range result {
		result[i], _ = number(list.Index(i))
	}
	return result, true
}

func number(value reflect.Value) (int64, bool) {
	if value.Kind() == reflect.Interface {
		value = value.Elem()
	}
	switch {
	case value.CanInt():
		return value.Int(), true
	case value.CanUint():
		return int64(value.Uint()), true
	case value.CanFloat():
		return int64(value.Float()), true
	case value.Kind() == reflect.Bool:
		if value.Bool() {
			return 1, true
		}
		return 0, true
	}
	return 0, false
}
