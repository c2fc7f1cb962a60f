// Prints what package kvcached says about models whose metadata it is given, for a test to compare with `kvpatch estimate`.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"kvpatch.dev/shim/kvcached"
)

// ask is a line of the input; an answer is a line of the output.
type ask struct {
	Metadata map[string]any
	Context  kvcached.Context
	Tokens   uint64
}

type sizes struct {
	Error                                     string
	Cells, Sequence, Ubatch                   uint64
	Bytes, Reserved, Mapped                   uint64
	NeedReserved, NeedFirst, Upper, UpperStep uint64
	Inexact                                   string
}

func main() {
	out := bufio.NewWriter(os.Stdout)
	defer out.Flush()
	input := bufio.NewScanner(os.Stdin)
	input.Buffer(nil, 16<<20)
	for input.Scan() {
		var question ask
		if err := json.Unmarshal(input.Bytes(), &question); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		answer := []sizes{}
		for _, device := range []kvcached.DeviceKind{kvcached.HostMemory, kvcached.CUDAMemory} {
			answer = append(answer, about(question, device))
		}
		if err := json.NewEncoder(out).Encode(answer); err != nil {
			panic(err)
		}
	}
}

func about(question ask, device kvcached.DeviceKind) (s sizes) {
	read := func(key string) any { return question.Metadata[key] }
	need := kvcached.Shape{Metadata: read, Context: question.Context, Device: device}.Need()
	s.NeedReserved, s.NeedFirst, s.Inexact = need.Reserved, need.FirstStep, need.Inexact

	// The same model under a name that nobody knows: estimated from above.
	arch, _ := question.Metadata["general.architecture"].(string)
	nobody := func(key string) any {
		if key == "general.architecture" {
			return "nobody"
		}
		if rest, ok := strings.CutPrefix(key, "nobody."); ok {
			return question.Metadata[arch+"."+rest]
		}
		return nil
	}
	upper := kvcached.Shape{Metadata: nobody, Context: question.Context, Device: device}.Need()
	s.Upper, s.UpperStep = upper.Reserved, upper.FirstStep

	model, err := kvcached.Derive(read)
	if err != nil {
		s.Error = err.Error()
		return s
	}
	caches, err := model.Plan(question.Context)
	if err != nil {
		s.Error = err.Error()
		return s
	}
	s.Cells, s.Sequence, s.Ubatch = caches.Cells, caches.Sequence, caches.Ubatch
	s.Bytes, s.Reserved, s.Mapped = caches.Bytes(device), caches.Reserved(device), caches.Mapped(device, question.Tokens)
	return s
}
