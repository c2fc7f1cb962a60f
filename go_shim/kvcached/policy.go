package kvcached

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Victim is a model that could be put to sleep, or unloaded.
type Victim struct {
	Model   string
	Name    string
	LastUse time.Duration // CLOCK_MONOTONIC
	Frees   uint64        // bytes on the device that is short
}

// Policy says who gives way first. It is asked only about models that may go; who may is not its to decide.
type Policy interface {
	Name() string
	// Compare is negative where a goes before b, as in slices.SortFunc.
	Compare(a, b Victim) int
}

// lru takes the model first that was not used for the longest time.
type lru struct{}

func (lru) Name() string { return PolicyLRU }

func (lru) Compare(a, b Victim) int {
	switch {
	case a.LastUse < b.LastUse:
		return -1
	case a.LastUse > b.LastUse:
		return 1
	}
	return strings.Compare(a.Model, b.Model)
}

var policies = []Policy{lru{}}

// policyNamed finds a policy; "" is the first.
func policyNamed(name string) (Policy, error) {
	if name == "" {
		return policies[0], nil
	}
	i := slices.IndexFunc(policies, func(p Policy) bool { return p.Name() == name })
	if i < 0 {
		names := make([]string, 0, len(policies))
		for _, p := range policies {
			names = append(names, p.Name())
		}
		return nil, fmt.Errorf("kvcached: no eviction policy %q; there is %s", name, strings.Join(names, ", "))
	}
	return policies[i], nil
}
