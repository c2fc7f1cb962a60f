package cmd

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/ollama/ollama/api"
)

// A sleeper has nothing on the GPU, and is not on the CPU either.
func TestKVCachedPsOfASleeper(t *testing.T) {
	list := func(states ...string) string {
		t.Helper()
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			var response api.ProcessResponse
			for _, state := range states {
				model := api.ProcessModelResponse{Name: "m-" + state, Digest: "0123456789abcdef", Size: 1000, ExpiresAt: time.Now().Add(time.Hour)}
				if state != "" {
					model.KVCached = &api.KVCachedStatus{State: state}
				}
				response.Models = append(response.Models, model)
			}
			json.NewEncoder(w).Encode(response)
		}))
		defer server.Close()
		t.Setenv("OLLAMA_HOST", server.URL)

		read, write, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer func(stdout *os.File) { os.Stdout = stdout }(os.Stdout)
		os.Stdout = write
		command := &cobra.Command{}
		command.SetContext(t.Context())
		err = ListRunningHandler(command, nil)
		write.Close()
		text, _ := io.ReadAll(read)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	for _, state := range []string{"asleep", "sleeping", "waking"} {
		if text := list(state); strings.Contains(text, "CPU") || !strings.Contains(text, "m-"+state+" ") || strings.Count(text, state) != 2 {
			t.Errorf("%s:\n%s", state, text)
		}
	}
	for _, state := range []string{"", "awake", "unmanaged"} {
		if text := list(state); !strings.Contains(text, "100% CPU") {
			t.Errorf("%q:\n%s", state, text)
		}
	}
}
