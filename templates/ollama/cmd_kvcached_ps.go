package cmd

import "github.com/ollama/ollama/api"

// kvcachedAsleep says whether a model's sizes are those of a sleeper: what is not on the GPU then is not on the CPU either.
func kvcachedAsleep(m api.ProcessModelResponse) bool {
	if m.KVCached == nil {
		return false
	}
	switch m.KVCached.State {
	case "asleep", "sleeping", "waking":
		return true
	}
	return false
}
