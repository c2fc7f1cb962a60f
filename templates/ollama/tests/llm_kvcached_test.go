package llm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/fs/ggml"
	"github.com/ollama/ollama/kvcached"
	"github.com/ollama/ollama/kvcached/kvcachedtest"
	"github.com/ollama/ollama/ml"
)

// kvcachedManager is one with these settings, for the time of a test, and its ledger of host memory.
func kvcachedManager(t *testing.T, settings kvcached.Settings) (*kvcached.Manager, *kvcachedtest.Ledger) {
	t.Helper()
	settings.Enabled, settings.Source, settings.HostLimit = true, "a test", kvcached.NoLimit
	library := &kvcachedtest.Library{}
	manager, err := kvcached.Open(settings, library, "/ledger")
	if err != nil {
		t.Fatal(err)
	}
	kvcached.SetDefault(manager)
	t.Cleanup(func() {
		library.Close(manager)
		kvcached.SetDefault(nil)
	})
	return manager, library.Ledger("/ledger")
}

func kvcachedModel(t *testing.T) (string, *ggml.GGML) {
	t.Helper()
	return kvcachedModelOf(t, ggml.KV{
		"general.architecture":          "llama",
		"llama.context_length":          uint32(4096),
		"llama.embedding_length":        uint32(512),
		"llama.block_count":             uint32(2),
		"llama.attention.head_count":    uint32(8),
		"llama.attention.head_count_kv": uint32(4),
	})
}

func kvcachedModelOf(t *testing.T, kv ggml.KV) (string, *ggml.GGML) {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), "model.gguf"))
	if err != nil {
		t.Fatal(err)
	}
	if err := ggml.WriteGGUF(file, kv, []*ggml.Tensor{{Name: "output.weight", Shape: []uint64{8}, WriterTo: bytes.NewReader(make([]byte, 32))}}); err != nil {
		t.Fatal(err)
	}
	file.Close()
	f, err := LoadModel(file.Name(), 1024)
	if err != nil {
		t.Fatal(err)
	}
	return file.Name(), f
}

// kvcachedServer puts a program in llama-server's place that writes its environment down and waits for its end.
func kvcachedServer(t *testing.T) (environment string) {
	t.Helper()
	if _, err := exec.LookPath("sh"); err != nil {
		t.Skip("no shell")
	}
	directory := t.TempDir()
	environment = filepath.Join(directory, "environment")
	script := fmt.Sprintf("#!/bin/sh\nenv > '%s.new' && mv '%s.new' '%s'\nexec sleep 60\n", environment, environment, environment)
	if err := os.WriteFile(filepath.Join(directory, "llama-server"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	defer func(path string) { t.Cleanup(func() { ml.LibOllamaPath = path }) }(ml.LibOllamaPath)
	ml.LibOllamaPath = directory
	return environment
}

func kvcachedVariables(t *testing.T, environment string) string {
	t.Helper()
	for range 400 {
		if data, err := os.ReadFile(environment); err == nil {
			os.Remove(environment)
			var lines []string
			for _, line := range strings.Split(string(data), "\n") {
				if strings.Contains(line, "KVCACHED_") {
					lines = append(lines, line)
				}
			}
			slices.Sort(lines)
			return strings.Join(lines, " ")
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("the runner was not started")
	return ""
}

// kvcachedOffered is a runner that is created on a lease, as the scheduler does it.
func kvcachedOffered(t *testing.T, manager *kvcached.Manager, path string, f *ggml.GGML) (*llamaServerRunner, error) {
	t.Helper()
	cache, err := manager.Admit(t.Context(), kvcached.Request{Model: path, Need: KVCachedNeed(KVCachedLoad{ModelPath: path, GGML: f}), Whole: true})
	if err != nil {
		t.Fatal(err)
	}
	KVCachedOffer(path, cache, cache.Need().Total())
	return kvcachedRunner(path, f)
}

func kvcachedRunner(path string, f *ggml.GGML) (*llamaServerRunner, error) {
	runner, err := NewLlamaServerRunner(nil, path, f, nil, nil, api.DefaultOptions(), 1, "", LlamaServerConfig{})
	if err != nil {
		return nil, err
	}
	return runner.(*llamaServerRunner), nil
}

func TestKVCachedLeaseLivesAsLongAsTheRunner(t *testing.T) {
	environment := kvcachedServer(t)
	manager, ledger := kvcachedManager(t, kvcached.Settings{Limit: 1 << 30})
	path, f := kvcachedModel(t)
	variables := func(slot int) string {
		slots, _ := ledger.Slots()
		if len(slots) != 1 || slots[0].Group != manager.Group() {
			t.Fatalf("while it runs: %+v", slots)
		}
		return fmt.Sprintf("KVCACHED_GROUP=%s KVCACHED_LEASES=host,%d,%d,/ledger KVCACHED_LEDGER=/ledger KVCACHED_LIMIT=%d KVCACHED_ROOM_WAIT_MS=1500 KVCACHED_SLEEPS=1 KVCACHED_SLOT=%d OLLAMA_KVCACHED_ENABLED=true",
			slots[0].Group, slot, 1<<30, 1<<30, slot)
	}
	manager.SetRoomWait(1500 * time.Millisecond)

	runner, err := kvcachedOffered(t, manager, path, f)
	if err != nil {
		t.Fatal(err)
	}
	defer runner.Close()
	if cache, _ := KVCachedWithdraw(path); cache != nil {
		t.Error("the offer stands still")
	}
	if got := kvcachedVariables(t, environment); got != variables(1) {
		t.Errorf("environment: %s, want %s", got, variables(1))
	}
	if slots, _ := ledger.Slots(); slots[0].Lease != KVCachedNeed(KVCachedLoad{ModelPath: path, GGML: f}).Total() {
		t.Errorf("while it runs: %+v", slots)
	}

	// A runner that is started anew has a lease of its own.
	if err := runner.stopProcess(); err != nil {
		t.Fatal(err)
	}
	if slots, _ := ledger.Slots(); len(slots) != 0 {
		t.Errorf("after its end: %+v", slots)
	}
	if err := runner.startProcess(); err != nil {
		t.Fatal(err)
	}
	if got := kvcachedVariables(t, environment); got != variables(2) {
		t.Errorf("environment: %s, want %s", got, variables(2))
	}

	// One that dies by itself takes its lease along.
	if err := runner.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-runner.done
	if slots, _ := ledger.Slots(); len(slots) != 0 {
		t.Errorf("after a crash: %+v", slots)
	}
	if err := runner.Close(); err != nil {
		t.Error(err)
	}
}

// A child may be known to have ended before its lease has been given back.
func TestKVCachedRestartWaitsForTheLastEnd(t *testing.T) {
	manager, ledger := kvcachedManager(t, kvcached.Settings{Limit: 1 << 30})
	path, f := kvcachedModel(t)
	cache := manager.NewKVCache(path, KVCachedNeed(KVCachedLoad{ModelPath: path, GGML: f}))
	if err := cache.Allocate(int(cache.Need().Total())); err != nil {
		t.Fatal(err)
	}
	runner := &llamaServerRunner{
		ggml:   f,
		done:   make(chan struct{}),
		launch: llamaServerLaunchConfig{modelPath: path, extraEnvs: map[string]string{}},
	}
	runner.kvcached.cache.Store(cache)
	runner.kvcached.leased = cache.Need().Total()
	go func(done chan struct{}) {
		time.Sleep(50 * time.Millisecond)
		runner.kvcachedFree()
		close(done)
	}(runner.done)

	slot := ""
	if _, _, err := runner.kvcachedStart(func(launch llamaServerLaunchConfig, _ io.Writer) (*exec.Cmd, int, error) {
		slot = launch.extraEnvs[kvcached.SlotVariable]
		return nil, 7, nil
	}); err != nil {
		t.Fatal(err)
	}
	slots, _ := ledger.Slots()
	if slot != "2" || len(slots) != 1 || slots[0].Index != 2 {
		t.Errorf("started with slot %q, leased: %+v", slot, slots)
	}

	// Anew, and there is no room any more: nothing is started, and nobody is asked for room.
	runner.kvcachedFree()
	if len(runner.launch.extraEnvs) != 0 {
		t.Errorf("left in the environment: %v", runner.launch.extraEnvs)
	}
	other := manager.NewKVCache("other", kvcached.Need{Weights: 1 << 30})
	if err := other.Allocate(1 << 30); err != nil {
		t.Fatal(err)
	}
	_, _, err := runner.kvcachedStart(func(llamaServerLaunchConfig, io.Writer) (*exec.Cmd, int, error) {
		t.Error("started without a lease")
		return nil, 7, nil
	})
	var refusal *kvcached.LimitError
	if !errors.As(err, &refusal) || IsOutOfMemory(err) || statusErrorLine(err.Error()) != "" {
		t.Errorf("%v", err)
	}
}

func TestKVCachedRunnerThatCannotStart(t *testing.T) {
	kvcachedServer(t)
	manager, ledger := kvcachedManager(t, kvcached.Settings{Limit: 1 << 30})
	path, f := kvcachedModel(t)
	if err := os.Chmod(filepath.Join(ml.LibOllamaPath, "llama-server"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := kvcachedOffered(t, manager, path, f); err == nil {
		t.Fatal("a runner that is no program was started")
	}
	if slots, _ := ledger.Slots(); len(slots) != 0 {
		t.Errorf("left: %+v", slots)
	}
}

// On a device without elastic memory a runner is stock's, whatever the server's own environment says.
func TestKVCachedRunnerWithoutALease(t *testing.T) {
	environment := kvcachedServer(t)
	kvcachedManager(t, kvcached.Settings{Limit: 1 << 30})
	t.Setenv(kvcached.EnabledVariable, "true")
	path, f := kvcachedModel(t)
	runner, err := kvcachedRunner(path, f)
	if err != nil {
		t.Fatal(err)
	}
	defer runner.Close()
	if got := kvcachedVariables(t, environment); got != "OLLAMA_KVCACHED_ENABLED=false" {
		t.Errorf("environment: %s", got)
	}
	if runner.KVCached() != nil {
		t.Error("it takes part")
	}
}

// llama-server keeps no margin beside a model whose whole need was leased; it splits one that got less, as on a small card.
func TestKVCachedFit(t *testing.T) {
	gpus := []ml.DeviceInfo{{Name: "CUDA0"}}
	for _, c := range []struct {
		launch llamaServerLaunchConfig
		whole  bool
		user   string
		want   map[string]string
	}{
		{llamaServerLaunchConfig{gpus: gpus, opts: api.Options{Runner: api.Runner{NumGPU: -1}}}, true, "", map[string]string{"LLAMA_ARG_FIT_TARGET": "0"}},
		{llamaServerLaunchConfig{gpus: gpus, opts: api.Options{Runner: api.Runner{NumGPU: -1}}, projectors: []string{"p"}}, true, "", map[string]string{"LLAMA_ARG_FIT": "off"}},
		{llamaServerLaunchConfig{gpus: gpus, opts: api.Options{Runner: api.Runner{NumGPU: -1}}}, false, "", nil},
		{llamaServerLaunchConfig{gpus: gpus, opts: api.Options{Runner: api.Runner{NumGPU: 5}}}, true, "", nil},
		{llamaServerLaunchConfig{opts: api.Options{Runner: api.Runner{NumGPU: -1}}}, true, "", nil},
		{llamaServerLaunchConfig{gpus: gpus, opts: api.Options{Runner: api.Runner{NumGPU: -1}}}, true, "LLAMA_ARG_FIT_TARGET", nil},
	} {
		if c.user != "" {
			t.Setenv(c.user, "2048")
		}
		runner := &llamaServerRunner{launch: c.launch}
		if got := runner.kvcachedFit(c.whole); !maps.Equal(got, c.want) {
			t.Errorf("%+v: %v, want %v", c, got, c.want)
		}
	}
}

// Upstream's check sees the exact cache in place of its formula, which counts f16 whatever the cache is.
func TestKVCachedPrediction(t *testing.T) {
	path, f := kvcachedModel(t)
	stock := PredictServerVRAM(path, f, 4096)
	if want := uint64(2*2*4096*4*64*2) + KVCachedNeed(KVCachedLoad{ModelPath: path, GGML: f}).Weights; stock != want {
		t.Errorf("while off: %d, want %d", stock, want)
	}
	kvcachedManager(t, kvcached.Settings{Limit: 1 << 30})
	t.Setenv("OLLAMA_FLASH_ATTENTION", "1")
	t.Setenv("OLLAMA_KV_CACHE_TYPE", "q8_0")
	if got, want := PredictServerVRAM(path, f, 4096), stock-2*2*4096*4*64*2+2*2*4096*4*(64/32*34); got != want {
		t.Errorf("%d, want %d", got, want)
	}
}

func TestKVCachedOffChangesNothing(t *testing.T) {
	_, f := kvcachedModel(t)
	env := map[string]string{"A": "b"}
	opts := api.DefaultOptions()
	before := opts
	os.Unsetenv(kvcached.EnabledVariable)
	kvcachedPrepare(env, f, &opts, 1, true)
	if len(env) != 1 {
		t.Errorf("%v", env)
	}
	// What Ollama reads as off (quotes are trimmed) must be off for the runner, too.
	t.Setenv(kvcached.EnabledVariable, `"no"`)
	kvcachedPrepare(env, f, &opts, 1, true)
	if env[kvcached.EnabledVariable] != "false" || opts.NumCtx != before.NumCtx {
		t.Errorf("%v, num_ctx %d", env, opts.NumCtx)
	}

	runner := &llamaServerRunner{launch: llamaServerLaunchConfig{extraEnvs: map[string]string{kvcached.SlotVariable: "1"}}, options: before}
	started := false
	if _, _, err := runner.kvcachedStart(func(launch llamaServerLaunchConfig, _ io.Writer) (*exec.Cmd, int, error) {
		started = len(launch.extraEnvs) == 1
		return nil, 7, nil
	}); err != nil || !started {
		t.Errorf("%v, started %v", err, started)
	}
	runner.kvcachedFree()
	opts.NumCtx = 7
	if ctx := runner.kvcachedCompletion(t.Context(), &opts); ctx != t.Context() || runner.kvcachedAt(&opts) != runner || opts.NumPredict != before.NumPredict {
		t.Error("a request is bounded")
	}
}

// What the child maps through the library must not be charged beside its claims, what it holds otherwise must be.
func TestKVCachedOutside(t *testing.T) {
	file, err := os.Create(filepath.Join(t.TempDir(), "model.gguf"))
	if err != nil {
		t.Fatal(err)
	}
	const block = 144 // bytes of 256 elements of Q4_K
	tensor := func(name string, kind uint32, bytesInAll int, shape ...uint64) *ggml.Tensor {
		return &ggml.Tensor{Name: name, Kind: kind, Shape: shape, WriterTo: bytes.NewReader(make([]byte, bytesInAll))}
	}
	tied := []*ggml.Tensor{
		tensor("token_embd.weight", 12, 16*block, 256, 16),
		tensor("blk.0.attn_q.weight", 12, 8*block, 256, 8),
		tensor("blk.0.attn_k.weight", 12, 4*block, 256, 4), // no whole number of eight rows
		tensor("blk.0.ffn_up_exps.weight", 12, 32*block, 256, 8, 4),
		tensor("blk.0.attn_norm.weight", 0, 4*256, 256),
	}
	if err := ggml.WriteGGUF(file, ggml.KV{"general.architecture": "llama", "llama.block_count": uint32(1)}, tied); err != nil {
		t.Fatal(err)
	}
	file.Close()
	f, err := LoadModel(file.Name(), 1024)
	if err != nil {
		t.Fatal(err)
	}

	yes, no := true, false
	for _, c := range []struct {
		mapped *bool
		cpu    kvcached.CPU
		want   uint64
	}{
		{nil, kvcached.CPU{AVX2: true}, 7777},
		{&yes, kvcached.CPU{AVX2: true}, 7777},
		{&no, kvcached.CPU{}, 0},
		{&no, kvcached.CPU{AVX2: true}, (16 + 8 + 32) * block},
	} {
		if got := kvcachedOutside(api.Options{Runner: api.Runner{UseMMap: c.mapped}}, c.cpu, f, 7777); got != c.want {
			t.Errorf("mapped %v, %+v: %d, want %d", c.mapped, c.cpu, got, c.want)
		}
	}
}
