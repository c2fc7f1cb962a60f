package llm

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/fs/ggml"
	"github.com/ollama/ollama/kvcached"
	"github.com/ollama/ollama/ml"
)

// kvcachedLedger keeps slots in memory. It never gives a slot out twice, so that a stale one shows.
type kvcachedLedger struct {
	mu    sync.Mutex
	next  int
	slots []kvcached.Slot
}

func (l *kvcachedLedger) Version() string                            { return "test" }
func (l *kvcachedLedger) OpenLedger(string) (kvcached.Ledger, error) { return l, nil }
func (l *kvcachedLedger) Path() string                               { return "/ledger" }

func (l *kvcachedLedger) Slots() ([]kvcached.Slot, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.slots), nil
}

func (l *kvcachedLedger) Unlease(slot int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.slots = slices.DeleteFunc(l.slots, func(s kvcached.Slot) bool { return s.Index == slot })
	return nil
}

func (l *kvcachedLedger) Lease(group, name string, size, fixed, limit uint64) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if size > limit {
		return -1, &kvcached.LibraryError{Code: -3, Name: "KVCACHED_E_LIMIT"}
	}
	l.next++
	l.slots = append(l.slots, kvcached.Slot{Index: l.next, Name: name, Group: group, Lease: size, Fixed: fixed, Charge: size})
	return l.next, nil
}

func kvcachedManager(t *testing.T, limit uint64) *kvcachedLedger {
	t.Helper()
	ledger := &kvcachedLedger{}
	manager, err := kvcached.Open(kvcached.Settings{Enabled: true, Limit: limit, Source: "a test"}, ledger, "")
	if err != nil {
		t.Fatal(err)
	}
	kvcached.SetDefault(manager)
	t.Cleanup(func() { kvcached.SetDefault(nil) })
	return ledger
}

func kvcachedModel(t *testing.T) (string, *ggml.GGML) {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), "model.gguf"))
	if err != nil {
		t.Fatal(err)
	}
	if err := ggml.WriteGGUF(file, ggml.KV{
		"general.architecture":          "llama",
		"llama.context_length":          uint32(4096),
		"llama.embedding_length":        uint32(512),
		"llama.block_count":             uint32(2),
		"llama.attention.head_count":    uint32(8),
		"llama.attention.head_count_kv": uint32(4),
	}, []*ggml.Tensor{{Name: "output.weight", Shape: []uint64{8}, WriterTo: bytes.NewReader(make([]byte, 32))}}); err != nil {
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

func kvcachedRunner(path string, f *ggml.GGML) (*llamaServerRunner, error) {
	runner, err := NewLlamaServerRunner(nil, path, f, nil, nil, api.DefaultOptions(), 1, "", LlamaServerConfig{})
	if err != nil {
		return nil, err
	}
	return runner.(*llamaServerRunner), nil
}

func TestKVCachedLeaseLivesAsLongAsTheRunner(t *testing.T) {
	environment := kvcachedServer(t)
	ledger := kvcachedManager(t, 1<<30)
	path, f := kvcachedModel(t)
	variables := func(slot int) string {
		slots, _ := ledger.Slots()
		if len(slots) != 1 || !strings.HasPrefix(slots[0].Group, fmt.Sprintf("ollama-%d-", os.Getpid())) {
			t.Fatalf("while it runs: %+v", slots)
		}
		return fmt.Sprintf("KVCACHED_GROUP=%s KVCACHED_LEDGER=/ledger KVCACHED_LIMIT=%d KVCACHED_SLOT=%d OLLAMA_KVCACHED_ENABLED=true", slots[0].Group, 1<<30, slot)
	}

	runner, err := kvcachedRunner(path, f)
	if err != nil {
		t.Fatal(err)
	}
	defer runner.Close()
	if got := kvcachedVariables(t, environment); got != variables(1) {
		t.Errorf("environment: %s, want %s", got, variables(1))
	}
	if slots, _ := ledger.Slots(); len(slots) != 1 || slots[0].Lease != KVCachedNeed(KVCachedLoad{ModelPath: path, GGML: f}).Total() {
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
	ledger := kvcachedManager(t, 1<<30)
	path, f := kvcachedModel(t)
	runner := &llamaServerRunner{
		ggml:   f,
		done:   make(chan struct{}),
		launch: llamaServerLaunchConfig{modelPath: path, extraEnvs: map[string]string{}},
	}
	if err := runner.kvcachedLease(kvcached.Default()); err != nil {
		t.Fatal(err)
	}
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

	ledger := kvcachedManager(t, 1<<30)
	path, f := kvcachedModel(t)
	for _, mapped := range []*bool{&yes, &no} {
		runner := &llamaServerRunner{ggml: f, launch: llamaServerLaunchConfig{
			modelPath: path, extraEnvs: map[string]string{}, opts: api.Options{Runner: api.Runner{UseMMap: mapped}},
		}}
		if err := runner.kvcachedLease(kvcached.Default()); err != nil {
			t.Fatal(err)
		}
	}
	need := KVCachedNeed(KVCachedLoad{ModelPath: path, GGML: f})
	slots, _ := ledger.Slots()
	if slots[0].Fixed != need.Weights || slots[1].Fixed != 0 || slots[0].Lease != need.Total() || slots[1].Lease != need.Total() {
		t.Errorf("%+v; need %+v", slots, need)
	}
}

func TestKVCachedRefusalStartsNothing(t *testing.T) {
	environment := kvcachedServer(t)
	kvcachedManager(t, 1000)
	path, f := kvcachedModel(t)
	_, err := kvcachedRunner(path, f)
	var refusal *kvcached.LimitError
	if !errors.As(err, &refusal) || refusal.Limit != 1000 || refusal.Need != KVCachedNeed(KVCachedLoad{ModelPath: path, GGML: f}) {
		t.Errorf("%v", err)
	}
	if IsOutOfMemory(err) || statusErrorLine(err.Error()) != "" {
		t.Errorf("%q would be taken for a crash", err)
	}
	time.Sleep(50 * time.Millisecond)
	if _, err := os.Stat(environment); err == nil {
		t.Error("the runner was started all the same")
	}
}

func TestKVCachedRunnerThatCannotStart(t *testing.T) {
	kvcachedServer(t)
	ledger := kvcachedManager(t, 1<<30)
	path, f := kvcachedModel(t)
	if err := os.Chmod(filepath.Join(ml.LibOllamaPath, "llama-server"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := kvcachedRunner(path, f); err == nil {
		t.Fatal("a runner that is no program was started")
	}
	if slots, _ := ledger.Slots(); len(slots) != 0 {
		t.Errorf("left: %+v", slots)
	}
}

// llama.cpp's own words say nothing of the limit, and reach the client.
func TestKVCachedLimitIsNamedWhereLoadingFails(t *testing.T) {
	const upstream = "llama_init_from_model: failed to initialize the context: failed to allocate compute pp buffers\n"
	const ours = "kvcached: CPU compute: no room for 21520416 bytes: KVCACHED_E_LIMIT: the limit leaves no room\n"
	for text, want := range map[string]bool{
		ours + ours + upstream: true,
		upstream:               false,
		"kvcached: no room for 4096 bytes: KVCACHED_E_LIMIT: a step of a request\n" + upstream: false,
		"kvcached: CPU compute: out of memory for 4096 bytes: KVCACHED_E_NOMEM\n" + upstream:   false,
	} {
		var log bytes.Buffer
		status := NewStatusWriter(&log)
		output := &kvcachedOutput{inner: status, status: status, limit: kvcached.Settings{Limit: 20_000_000, Source: "a test"}}
		for line := range strings.SplitAfterSeq(text, "\n") {
			if _, err := output.Write([]byte(line)); err != nil {
				t.Fatal(err)
			}
		}
		said := strings.Count(status.LastError(), "no room for 21.53 MB (CPU compute) beside what is charged: the limit for all models together is 20 MB, set by a test")
		if (said == 1) != want || said > 1 || log.String() != text || !IsOutOfMemoryMessage(status.LastError()) {
			t.Errorf("%q: %q, logged %q", text, status.LastError(), log.String())
		}
	}
}

// Upstream passes over an error in a stream.
func TestKVCachedStreamEndsWithItsError(t *testing.T) {
	long := "data: " + strings.Repeat("a", 10000) + "\n"
	wanted := `data: {"error":{"code":503,"message":"ended for want of memory","type":"unavailable_error"}}` + "\n"
	for _, c := range []struct {
		kind, sent, got, err string
	}{
		{"text/event-stream", long + "data: x\n\n" + wanted + "data: [DONE]\n", long + "data: x\n\n", "ended for want of memory"},
		{"text/event-stream; charset=utf-8", wanted, "", "ended for want of memory"},
		{"text/event-stream", long + "data: x", long + "data: x", ""},
		{"text/event-stream", strings.Replace(wanted, "503", "500", 1), strings.Replace(wanted, "503", "500", 1), ""},
		{"application/json", wanted, wanted, ""},
	} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", c.kind)
			io.WriteString(w, c.sent)
		}))
		client := http.Client{Transport: kvcachedTransport{server.Client().Transport}}
		response, err := client.Get(server.URL)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(response.Body)
		if string(got) != c.got || fmt.Sprint(err) != cmp.Or(c.err, "<nil>") || response.Body.Close() != nil {
			t.Errorf("%s, %q: got %q, %v", c.kind, c.sent, got, err)
		}
		server.Close()
	}
}

func TestKVCachedOffChangesNothing(t *testing.T) {
	path, f := kvcachedModel(t)
	env := map[string]string{"A": "b"}
	prepare := func() {
		t.Helper()
		if err := kvcachedPrepare(env, path, f, nil, nil, "", LlamaServerConfig{}); err != nil {
			t.Fatal(err)
		}
	}
	os.Unsetenv(kvcached.EnabledVariable)
	prepare()
	if len(env) != 1 {
		t.Errorf("%v", env)
	}
	// What Ollama reads as off (quotes are trimmed) must be off for the runner, too.
	t.Setenv(kvcached.EnabledVariable, `"no"`)
	prepare()
	if env[kvcached.EnabledVariable] != "false" {
		t.Errorf("%v", env)
	}

	runner := &llamaServerRunner{launch: llamaServerLaunchConfig{extraEnvs: map[string]string{kvcached.SlotVariable: "1"}}}
	started := false
	if _, _, err := runner.kvcachedStart(func(llamaServerLaunchConfig, io.Writer) (*exec.Cmd, int, error) {
		started = true
		return nil, 7, nil
	}); err != nil || !started {
		t.Errorf("%v, started %v", err, started)
	}
	runner.kvcachedFree()
}
