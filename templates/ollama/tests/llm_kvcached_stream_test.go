package llm

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/ollama/ollama/kvcached"
)

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
		output := &kvcachedOutput{inner: status, status: status, settings: kvcached.Settings{Limit: 20_000_000, Source: "a test"}}
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
