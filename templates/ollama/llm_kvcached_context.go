package llm

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"

	"github.com/ollama/ollama/api"
)

// A model is loaded with the context that is reserved for it, and serves requests with a smaller num_ctx without a reload.
// Each of them is bounded by its own num_ctx all the same: here in what is truncated and predicted, in llama-server by the
// field kvcachedContextField of the request.

// kvcachedContextField is the number of tokens that a request's slot may hold, prompt and answer. llama-server shifts or
// ends there as if it were the slot's whole context.
const kvcachedContextField = "kvcached_n_ctx"

// Models that see images have no smaller context in the scheduler.
const kvcachedImageContext = 2048

type kvcachedContextKey struct{}

// kvcachedNumCtx is the context of a request where that is less than the runner's, else 0.
func (s *llamaServerRunner) kvcachedNumCtx(opts *api.Options) int {
	if s.KVCached() == nil || opts == nil || opts.NumCtx <= 0 {
		return 0
	}
	numCtx := max(opts.NumCtx, 4) // the scheduler's own least
	if len(s.launch.projectors) > 0 {
		numCtx = max(numCtx, kvcachedImageContext)
	}
	if numCtx >= s.options.NumCtx {
		return 0
	}
	return numCtx
}

// kvcachedBound bounds the tokens that are predicted, and has the request's context told to the child.
func (s *llamaServerRunner) kvcachedBound(ctx context.Context, opts *api.Options) context.Context {
	numCtx := s.kvcachedNumCtx(opts)
	if numCtx == 0 {
		return ctx
	}
	opts.NumPredict = boundedNumPredict(opts.NumPredict, numCtx)
	return context.WithValue(ctx, kvcachedContextKey{}, numCtx)
}

func (s *llamaServerRunner) kvcachedCompletion(ctx context.Context, opts *api.Options) context.Context {
	return s.kvcachedBound(ctx, opts)
}

func (s *llamaServerRunner) kvcachedChat(ctx context.Context, opts *api.Options) context.Context {
	return s.kvcachedBound(ctx, opts)
}

// kvcachedAt is the runner as it truncates a prompt for a request: with the request's context for its own. It has what that
// takes, the tokenizer of the same child, and no more.
func (s *llamaServerRunner) kvcachedAt(opts *api.Options) *llamaServerRunner {
	numCtx := s.kvcachedNumCtx(opts)
	if numCtx == 0 {
		return s
	}
	at := &llamaServerRunner{port: s.port, client: s.client, ggml: s.ggml, launch: s.launch, options: s.options}
	at.options.NumCtx = numCtx
	return at
}

// kvcachedWithContext is the request with its context written into its body.
func kvcachedWithContext(request *http.Request) (*http.Request, error) {
	numCtx, ok := request.Context().Value(kvcachedContextKey{}).(int)
	if !ok || request.Body == nil || request.URL.Path != "/completion" && request.URL.Path != "/v1/chat/completions" {
		return request, nil
	}
	body, err := io.ReadAll(request.Body)
	request.Body.Close()
	if err != nil {
		return nil, err
	}
	told := request.Clone(request.Context())
	if rest, isObject := bytes.CutPrefix(body, []byte("{")); isObject {
		body = fmt.Appendf(nil, "{%q:%d,%s", kvcachedContextField, numCtx, rest)
	}
	told.ContentLength = int64(len(body))
	told.Body = io.NopCloser(bytes.NewReader(body))
	told.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
	return told, nil
}
