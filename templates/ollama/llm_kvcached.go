package llm

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"

	"github.com/ollama/ollama/fs/ggml"
	"github.com/ollama/ollama/kvcached"
)

// kvcachedPrepare refuses a model that does not fit with a *kvcached.LimitError; its lease is taken when its child is
// started. With elastic memory off it only spells out what the user may have written in another way, for the child to read.
func kvcachedPrepare(env map[string]string, modelPath string, f *ggml.GGML, adapters, projectors []string, kvCacheType string, config LlamaServerConfig) error {
	manager := kvcached.Default()
	if manager == nil {
		if _, set := os.LookupEnv(kvcached.EnabledVariable); set {
			env[kvcached.EnabledVariable] = "false"
		}
		return nil
	}

	need := KVCachedNeed(KVCachedLoad{ModelPath: modelPath, GGML: f, Adapters: adapters, Projectors: projectors, Draft: config.DraftModelPath, KVCacheType: kvCacheType})
	if err := manager.Check(modelPath, need); err != nil {
		slog.Warn("kvcached: model refused, no runner is started", "model", modelPath, "error", err)
		return err
	}
	return nil
}

// kvcachedLease takes the lease for a child that is about to be started, and puts into its environment where its slot is.
func (s *llamaServerRunner) kvcachedLease(manager *kvcached.Manager) error {
	l := s.launch
	need := s.kvcachedNeed()
	cache := manager.NewKVCache(l.modelPath, need)
	if err := cache.Allocate(int(need.Total())); err != nil {
		return err
	}
	for name, value := range cache.Env() {
		l.extraEnvs[name] = value
	}
	slog.Info("kvcached: lease taken", "model", manager.Name(l.modelPath), "slot", cache.Slot(),
		"weights", kvcached.FormatSize(need.Weights), "outside_the_library", kvcached.FormatSize(need.Outside),
		"first_kv_step", kvcached.FormatSize(need.FirstStep))
	return nil
}

// kvcachedStart starts the child by the function given. A lease ends with its child, so that a child started anew for the
// same runner takes another first; one that cannot be started gives its lease back.
func (s *llamaServerRunner) kvcachedStart(start func(llamaServerLaunchConfig, io.Writer) (*exec.Cmd, int, error)) (*exec.Cmd, int, error) {
	if manager := kvcached.Default(); manager != nil {
		// Ollama takes a child for ended as soon as its status is known; what waits for it gives lease and variables back a
		// moment later, and must not take the new child's.
		if s.done != nil {
			<-s.done
		}
		if s.kvcachedCache() == nil {
			if err := s.kvcachedLease(manager); err != nil {
				return nil, 0, err
			}
		}
	}
	var output io.Writer = s.output
	if s.client != nil && kvcached.Default() != nil {
		if _, wrapped := s.client.Transport.(kvcachedTransport); !wrapped {
			s.client.Transport = kvcachedTransport{s.client.Transport}
		}
	}
	if manager := kvcached.Default(); manager != nil && s.output != nil {
		output = &kvcachedOutput{inner: output, status: s.status, limit: manager.Settings()}
	}
	cmd, port, err := start(s.launch, output)
	if err != nil {
		s.kvcachedFree()
	}
	return cmd, port, err
}

// kvcachedOutput passes a child's output on, and adds the limit to the child's errors where it was the reason that the child
// could not load: what llama.cpp says itself is only that a buffer could not be had. Ollama acts on that, and tries again
// without the other models; the client is to see why it is of no use.
type kvcachedOutput struct {
	inner  io.Writer
	status *StatusWriter
	limit  kvcached.Settings
	said   bool
}

// Logged once a buffer that is mapped in full does not fit, so while a model is being loaded.
var kvcachedNoRoom = regexp.MustCompile(`(?m)kvcached: (\S+ [^:\n]+): no room for (\d+) bytes: KVCACHED_E_LIMIT`)

func (o *kvcachedOutput) Write(b []byte) (int, error) {
	if !o.said && bytes.Contains(b, []byte("KVCACHED_E_LIMIT")) {
		if match := kvcachedNoRoom.FindSubmatch(b); match != nil {
			o.said = true
			size, _ := strconv.ParseUint(string(match[2]), 10, 64)
			defer o.status.AppendError(fmt.Sprintf("kvcached: no room for %s (%s) beside what is charged: the limit for all models together is %s, set by %s; raise it, or use a smaller model or context",
				kvcached.FormatSize(size), match[1], kvcached.FormatSize(o.limit.Limit), o.limit.Source))
		}
	}
	return o.inner.Write(b)
}

// kvcachedTransport makes an answer that the child ends for want of memory end with that error. llama-server says so in an
// event of the stream, which Ollama passes over: the client would get a short answer, or none, and take it for a good one.
type kvcachedTransport struct{ http.RoundTripper }

func (t kvcachedTransport) RoundTrip(request *http.Request) (*http.Response, error) {
	next := t.RoundTripper
	if next == nil {
		next = http.DefaultTransport
	}
	response, err := next.RoundTrip(request)
	if err == nil && strings.HasPrefix(response.Header.Get("Content-Type"), "text/event-stream") {
		response.Body = &kvcachedStream{Closer: response.Body, source: bufio.NewReader(response.Body), atStart: true}
	}
	return response, err
}

type kvcachedStream struct {
	io.Closer
	source  *bufio.Reader
	piece   []byte // of a line; read, but not handed on yet
	atStart bool   // of a line
	err     error
}

func (s *kvcachedStream) Read(p []byte) (int, error) {
	if len(s.piece) == 0 && s.err == nil {
		var err error
		s.piece, err = s.source.ReadSlice('\n')
		if s.atStart {
			s.err = kvcachedWantOfMemory(s.piece)
		}
		if s.err != nil {
			s.piece = nil
		} else if !errors.Is(err, bufio.ErrBufferFull) {
			s.err = err
		}
		s.atStart = err == nil
	}
	n := copy(p, s.piece)
	s.piece = s.piece[n:]
	if n == 0 && len(p) > 0 {
		return 0, s.err
	}
	return n, nil
}

// kvcachedWantOfMemory is the error that a line of a stream tells of, where that is one which another try may not meet.
func kvcachedWantOfMemory(line []byte) error {
	event, ok := bytes.CutPrefix(line, []byte("data: "))
	if !ok || !bytes.HasPrefix(event, []byte(`{"error":`)) {
		return nil
	}
	var told struct {
		Error struct {
			Code    int    `json:"code"`
			Message string `json:"message"`
		} `json:"error"`
	}
	if json.Unmarshal(event, &told) != nil || told.Error.Code != http.StatusServiceUnavailable {
		return nil
	}
	return errors.New(told.Error.Message)
}

// kvcachedFree gives the lease of a child that has ended back. The variables go with it: the slot may be another's next.
func (s *llamaServerRunner) kvcachedFree() {
	cache := s.kvcachedCache()
	if cache == nil {
		return
	}
	for name := range cache.Env() {
		delete(s.launch.extraEnvs, name)
	}
	cache.Free()
}

// kvcachedCache is the cache whose lease this runner's child was given, nil for none. A slot named in the runner's
// environment is its own: kvcachedFree takes the name away before the slot can be leased again.
func (s *llamaServerRunner) kvcachedCache() *kvcached.KVCache {
	manager := kvcached.Default()
	if manager == nil {
		return nil
	}
	slot, err := strconv.Atoi(s.launch.extraEnvs[kvcached.SlotVariable])
	if err != nil {
		return nil
	}
	return manager.BySlot(slot)
}
