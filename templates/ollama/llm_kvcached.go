package llm

import (
	"errors"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/envconfig"
	"github.com/ollama/ollama/fs/ggml"
	"github.com/ollama/ollama/kvcached"
)

// kvcachedChild is what a runner keeps for elastic memory.
type kvcachedChild struct {
	// cache has the leases of this runner's child; nil for a runner that does not take part. It stays when the child has
	// ended: requests that held it still end, and a child started anew takes its leases through it.
	cache atomic.Pointer[kvcached.KVCache]
	// leased is the size of all leases as they were first taken; less than the need where the model is to spill
	leased uint64
	// variables are those of the leases, in the environment that the child is started with
	variables []string
}

// KVCached is the cache of this runner's child, nil for a runner that does not take part.
func (s *llamaServerRunner) KVCached() *kvcached.KVCache { return s.kvcached.cache.Load() }

// kvcachedOffer is a lease on its way from the scheduler to the runner that it is about to create.
type kvcachedOffer struct {
	cache  *kvcached.KVCache
	leased uint64
}

// By model file: the functions between the two are upstream's.
var kvcachedOffers = struct {
	sync.Mutex
	all map[string]kvcachedOffer
}{all: map[string]kvcachedOffer{}}

// KVCachedOffer gives the leases in cache, of so many bytes in all, to the next runner that is created for a model file.
func KVCachedOffer(modelPath string, cache *kvcached.KVCache, leased uint64) {
	kvcachedOffers.Lock()
	defer kvcachedOffers.Unlock()
	kvcachedOffers.all[modelPath] = kvcachedOffer{cache, leased}
}

// KVCachedWithdraw takes an offer back, or takes it up: the caller owns the leases. nil where there is none.
func KVCachedWithdraw(modelPath string) (cache *kvcached.KVCache, leased uint64) {
	kvcachedOffers.Lock()
	defer kvcachedOffers.Unlock()
	offer := kvcachedOffers.all[modelPath]
	delete(kvcachedOffers.all, modelPath)
	return offer.cache, offer.leased
}

// kvcachedPrepare sets the context that is reserved, and so the runner's own: what a request may use of it is bounded with
// the request. With elastic memory off it only spells out what the user may have written in another way, for the child to
// read.
func kvcachedPrepare(env map[string]string, f *ggml.GGML, opts *api.Options, parallel int, shift bool) {
	manager := kvcached.Default()
	if manager == nil {
		if _, set := os.LookupEnv(kvcached.EnabledVariable); set {
			env[kvcached.EnabledVariable] = "false"
		}
		return
	}
	opts.NumCtx = KVCachedReserve(manager, f, *opts, parallel, shift)
}

// KVCachedReserve is the context that a model is loaded with for a request with these options: as many tokens as the settings
// ask for, never more than the model was trained with, never less than the request's own; and that alone where the model
// could not shift (it is to, shift says) in a longer one.
func KVCachedReserve(manager *kvcached.Manager, f *ggml.GGML, opts api.Options, parallel int, shift bool) int {
	reserve := manager.Settings().MaxCtx
	if trained := int(f.KV().ContextLength()); trained > 0 {
		reserve = min(reserve, trained)
	}
	if kvcachedWindowed(f, opts, parallel, reserve, shift) {
		return opts.NumCtx
	}
	return max(opts.NumCtx, reserve)
}

// kvcachedStart starts the child by the function given, on the leases that the scheduler took for it. They end with their
// child, so that a child started anew for the same runner takes them again; one that cannot be started gives them back.
func (s *llamaServerRunner) kvcachedStart(start func(llamaServerLaunchConfig, io.Writer) (*exec.Cmd, int, error)) (*exec.Cmd, int, error) {
	if kvcached.Default() == nil {
		return start(s.launch, s.output)
	}
	// Ollama takes a child for ended as soon as its status is known; what waits for it gives leases and variables back a
	// moment later, and must not take the new child's.
	if s.done != nil {
		<-s.done
	}

	cache := s.KVCached()
	switch {
	case cache == nil:
		cache, s.kvcached.leased = KVCachedWithdraw(s.launch.modelPath)
	case cache.Slot() < 0:
		// at once or not at all: nobody else is asked for room while a load is under way
		if err := cache.Allocate(int(s.kvcached.leased)); err != nil {
			return nil, 0, err
		}
	}
	if cache == nil {
		// on a device without elastic memory
		s.launch.extraEnvs[kvcached.EnabledVariable] = "false"
		return start(s.launch, s.output)
	}

	s.kvcached.cache.Store(cache)
	variables := cache.Env()
	maps.Copy(variables, s.kvcachedFit(cache.Whole()))
	s.kvcached.variables = slices.Collect(maps.Keys(variables))
	maps.Copy(s.launch.extraEnvs, variables)
	if s.client != nil {
		if _, wrapped := s.client.Transport.(kvcachedTransport); !wrapped {
			s.client.Transport = kvcachedTransport{s.client.Transport}
		}
	}
	var output io.Writer
	if s.output != nil {
		output = &kvcachedOutput{inner: s.output, status: s.status, settings: kvcached.Default().Settings()}
	}
	need := cache.Need()
	slog.Info("kvcached: runner starts on its lease", "model", s.launch.modelPath, "slot", cache.Slot(),
		"need", kvcached.FormatSize(need.Total()), "weights", kvcached.FormatSize(need.Weights),
		"outside_the_library", kvcached.FormatSize(need.Outside), "first_kv_step", kvcached.FormatSize(need.FirstStep),
		"compute", kvcached.FormatSize(need.Compute), "context", kvcached.FormatSize(need.Context), "reserved_num_ctx", s.launch.opts.NumCtx)

	cmd, port, err := start(s.launch, output)
	if err != nil {
		s.kvcachedFree()
	}
	return cmd, port, err
}

// kvcachedFit has llama-server put all layers on the GPU where the whole model was leased. Left alone it keeps a margin free
// beside the model, which under a limit is others' memory; and one for a projector, which is in the lease. A model that
// was leased less than it needs is split by its rules, as on a card of the limit's size.
func (s *llamaServerRunner) kvcachedFit(whole bool) map[string]string {
	const fit, target = "LLAMA_ARG_FIT", "LLAMA_ARG_FIT_TARGET"
	for _, name := range []string{fit, target} {
		if _, set := os.LookupEnv(name); set {
			return nil // the user's own choice
		}
	}
	switch {
	case len(s.launch.gpus) == 0 || s.launch.opts.NumGPU >= 0 || !whole:
		return nil
	case len(s.launch.projectors) > 0:
		return map[string]string{fit: "off"}
	}
	return map[string]string{target: "0"}
}

// kvcachedFree gives the leases of a child that has ended back. The variables go with them: the slots may be another's next.
func (s *llamaServerRunner) kvcachedFree() {
	cache := s.KVCached()
	if cache == nil {
		return
	}
	for _, name := range s.kvcached.variables {
		delete(s.launch.extraEnvs, name)
	}
	s.kvcached.variables = nil
	cache.Free()
}

// kvcachedPredict is what upstream's fit check takes a model for: its files, and its whole KV cache by the exact sizes of
// its rows in place of upstream's formula (stock). Whether the model may run is not decided by it: that is its lease. But
// the size of the batch is, and with it that of compute buffers, which are mapped in full whatever the context holds.
func kvcachedPredict(modelPath string, f *ggml.GGML, numCtx int, stock uint64) uint64 {
	if kvcached.Default() == nil {
		return stock
	}
	opts := api.DefaultOptions()
	opts.NumCtx = numCtx
	need := KVCachedNeed(KVCachedLoad{ModelPath: modelPath, GGML: f, KVCacheType: envconfig.KvCacheType(), Options: opts})
	return need.Weights + need.Reserved
}

// kvcachedEnded begins llama-server's answer to a request that found no room.
const kvcachedEnded = "This request was ended for want of memory: "

// KVCachedEnded says whether an error is that of a request that ended at the limit. The others go on, and nothing needs to be
// unloaded for the next.
func KVCachedEnded(err error) bool {
	var limit *kvcached.LimitError
	return err != nil && (errors.As(err, &limit) || strings.Contains(err.Error(), kvcachedEnded))
}
