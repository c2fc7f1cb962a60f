package llm

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sync/semaphore"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/fs/ggml"
	"github.com/ollama/ollama/kvcached"
)

// A model is reserved as much context as the settings ask for, within what it was trained with.
func TestKVCachedReserve(t *testing.T) {
	_, f := kvcachedModel(t) // trained with 4096
	for _, c := range []struct{ setting, asked, want int }{
		{0, 2048, 2048}, {3000, 2048, 3000}, {3000, 4000, 4000}, {1 << 20, 2048, 4096}, {1 << 20, 8192, 8192},
	} {
		kvcachedManager(t, kvcached.Settings{Limit: 1 << 30, MaxCtx: c.setting})
		opts := api.DefaultOptions()
		opts.NumCtx = c.asked
		if kvcachedPrepare(map[string]string{}, f, &opts, 1, true); opts.NumCtx != c.want {
			t.Errorf("reserved %d, asked %d: %d, want %d", c.setting, c.asked, opts.NumCtx, c.want)
		}
	}
}

// A model with windows of 512 cells shifts in a context that is no longer than one of them and a batch, 1024 cells: it is
// loaded with such a num_ctx, and its requests with one are not within a longer context. Nothing of it without context shift.
func TestKVCachedWindows(t *testing.T) {
	kvcachedManager(t, kvcached.Settings{Limit: 1 << 30, MaxCtx: 4096})
	for _, c := range []struct {
		arch       string
		more       string // a key
		shift      bool
		projectors []string
		reserved   int // what a num_ctx of 256 is loaded with
		within     map[int]bool
	}{
		{"gemma2", "", true, nil, 256, map[int]bool{256: false, 1024: false, 1025: true, 4095: true, 4096: true}},
		{"gemma2", "", false, nil, 4096, map[int]bool{256: true}},
		{"gemma2", "", true, []string{"p"}, 4096, map[int]bool{256: true}},
		{"gemma2", "gemma2.pooling_type", true, nil, 4096, map[int]bool{256: true}},
		{"llama", "", true, nil, 4096, map[int]bool{256: true, 1024: true}},
	} {
		kv := ggml.KV{
			"general.architecture": c.arch, c.arch + ".context_length": uint32(4096), c.arch + ".embedding_length": uint32(512),
			c.arch + ".feed_forward_length": uint32(1024), c.arch + ".block_count": uint32(2), c.arch + ".attention.head_count": uint32(8),
			c.arch + ".attention.head_count_kv": uint32(4), c.arch + ".attention.sliding_window": uint32(512),
		}
		if c.more != "" {
			kv[c.more] = uint32(1)
		}
		_, f := kvcachedModelOf(t, kv)
		opts := api.DefaultOptions()
		opts.NumCtx, opts.NumBatch = 256, 512
		if kvcachedPrepare(map[string]string{}, f, &opts, 1, c.shift && len(c.projectors) == 0); opts.NumCtx != c.reserved {
			t.Errorf("%+v: loaded with %d", c, opts.NumCtx)
		}
		opts.NumCtx = 4096
		runner := &llamaServerRunner{ggml: f, options: opts, launch: llamaServerLaunchConfig{
			numParallel: 1, projectors: c.projectors, config: LlamaServerConfig{ContextShift: c.shift},
		}}
		for numCtx, want := range c.within {
			if got := runner.KVCachedWithin(numCtx); got != want {
				t.Errorf("%+v: %d: %v", c, numCtx, got)
			}
		}
	}
}

// kvcachedSeen is a request to llama-server as a test looks at it.
type kvcachedSeen struct {
	path string
	body map[string]any
	head string // of the body
}

// kvcachedAnswering is a runner whose child has a token a letter, and keeps what it is asked.
func kvcachedAnswering(t *testing.T, manager *kvcached.Manager, reserved int) (*llamaServerRunner, *[]kvcachedSeen) {
	t.Helper()
	var seen []kvcachedSeen
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		text, _ := io.ReadAll(r.Body)
		if int(r.ContentLength) != len(text) && r.Method == http.MethodPost {
			t.Errorf("%s: %d bytes of %d", r.URL.Path, len(text), r.ContentLength)
		}
		switch r.URL.Path {
		case "/health":
			io.WriteString(w, `{"status":"ok"}`)
		case "/tokenize":
			var asked struct{ Content string }
			json.Unmarshal(text, &asked)
			tokens := make([]int, len(asked.Content))
			for i := range tokens {
				tokens[i] = i
			}
			json.NewEncoder(w).Encode(map[string]any{"tokens": tokens})
		default:
			s := kvcachedSeen{path: r.URL.Path, head: string(text[:min(30, len(text))])}
			if err := json.Unmarshal(text, &s.body); err != nil {
				t.Errorf("%s: %v in %s", r.URL.Path, err, text)
			}
			seen = append(seen, s)
			w.Header().Set("Content-Type", "text/event-stream")
			io.WriteString(w, `data: {"content":"a","stop":true,"stop_type":"eos","choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}`+"\n\n")
		}
	}))
	t.Cleanup(server.Close)
	at, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	port, _ := strconv.Atoi(at.Port())
	path, f := kvcachedModel(t)
	opts := api.DefaultOptions()
	opts.NumCtx = reserved
	runner := &llamaServerRunner{
		port: port, cmd: &exec.Cmd{}, ggml: f, options: opts, sem: semaphore.NewWeighted(1), modelPath: path,
		client: &http.Client{Transport: kvcachedTransport{server.Client().Transport}},
		launch: llamaServerLaunchConfig{modelPath: path, opts: opts, config: LlamaServerConfig{ContextShift: true}},
	}
	runner.kvcached.cache.Store(manager.NewKVCache(path, kvcached.Need{Weights: 1}))
	return runner, &seen
}

// A request with a smaller context than the reserved one is truncated and bounded as after a reload with it, and the child
// is told; one with the whole context is sent as in stock.
func TestKVCachedRequestsAreBoundedByTheirContext(t *testing.T) {
	manager, _ := kvcachedManager(t, kvcached.Settings{Limit: 1 << 30})
	for _, c := range []struct {
		numCtx, numPredict int
		predict            int    // sent
		told               string // first member of the body where it is the context
	}{
		{100, -1, 1000, `{"kvcached_n_ctx":100,`},
		{100, 20, 20, `{"kvcached_n_ctx":100,`},
		{2, 20, 20, `{"kvcached_n_ctx":4,"`},
		{200, -1, 2000, ""},
		{4000, -1, 2000, ""},
		{0, -1, 2000, ""},
	} {
		runner, seen := kvcachedAnswering(t, manager, 200)
		bounded := &llamaServerRunner{port: runner.port, client: &http.Client{}, ggml: runner.ggml, options: runner.options, launch: runner.launch}
		if c.told != "" {
			bounded.options.NumCtx = max(c.numCtx, 4)
		}
		prompt := strings.Repeat("a", 150)
		request := func() *api.Options {
			opts := api.DefaultOptions()
			opts.NumCtx, opts.NumPredict, opts.NumKeep = c.numCtx, c.numPredict, 3
			return &opts
		}
		want, err := bounded.completionPromptForRequest(t.Context(), CompletionRequest{Prompt: prompt, Options: request(), Truncate: true})
		if err != nil {
			t.Fatal(err)
		}
		if err := runner.Completion(t.Context(), CompletionRequest{Prompt: prompt, Options: request(), Truncate: true}, func(CompletionResponse) {}); err != nil {
			t.Fatal(err)
		}
		if err := runner.Chat(t.Context(), ChatRequest{Messages: []api.Message{{Role: "user", Content: prompt}}, Options: request()}, func(ChatResponse) {}); err != nil {
			t.Fatal(err)
		}
		if len(*seen) != 2 || (*seen)[0].path != "/completion" || (*seen)[1].path != "/v1/chat/completions" {
			t.Fatalf("%+v", *seen)
		}
		for _, s := range *seen {
			_, told := s.body["kvcached_n_ctx"]
			if s.body["n_predict"] != float64(c.predict) || told != (c.told != "") || !strings.HasPrefix(s.head, c.told) {
				t.Errorf("%+v: %s n_predict %v, %s", c, s.path, s.body["n_predict"], s.head)
			}
		}
		if got := fmt.Sprint((*seen)[0].body["prompt"]); got != fmt.Sprint(want) {
			t.Errorf("%+v: prompt %s, want %v", c, got, want)
		}
	}
}

// Models that see images have a least context of their own, in stock too.
func TestKVCachedContextOfAModelThatSees(t *testing.T) {
	manager, _ := kvcachedManager(t, kvcached.Settings{Limit: 1 << 30})
	runner, seen := kvcachedAnswering(t, manager, 4096)
	runner.launch.projectors = []string{"projector"}
	var told []any
	for _, numCtx := range []int{512, 3000} {
		opts := api.DefaultOptions()
		opts.NumCtx = numCtx
		if err := runner.Completion(t.Context(), CompletionRequest{Prompt: "a", Options: &opts}, func(CompletionResponse) {}); err != nil {
			t.Fatal(err)
		}
		told = append(told, (*seen)[len(*seen)-1].body["kvcached_n_ctx"])
	}
	if !slices.Equal(told, []any{2048.0, 3000.0}) {
		t.Errorf("%v", told)
	}
	if err := runner.Completion(t.Context(), CompletionRequest{Prompt: "a"}, func(CompletionResponse) {}); err != nil {
		t.Errorf("without options: %v", err)
	}
}

func TestKVCachedEnded(t *testing.T) {
	for text, want := range map[string]bool{
		"This request was ended for want of memory: 4096 bytes":                             true,
		"error reading llama-server response: This request was ended for want of memory: x": true,
		"cudaMalloc failed: out of memory":                                                  false,
	} {
		if KVCachedEnded(fmt.Errorf("%s", text)) != want {
			t.Errorf("%q", text)
		}
	}
	if KVCachedEnded(nil) || !KVCachedEnded(fmt.Errorf("load: %w", &kvcached.LimitError{})) {
		t.Error("nil, or the limit's own error")
	}
}
