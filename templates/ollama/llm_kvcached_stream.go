package llm

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"strings"

	"github.com/ollama/ollama/kvcached"
)

// kvcachedOutput passes a child's output on, and adds the limit to the child's errors where it was the reason that the child
// could not load: what llama.cpp says itself is only that a buffer could not be had. Ollama acts on that, and tries again
// without the other models; the client is to see why it is of no use.
type kvcachedOutput struct {
	inner    io.Writer
	status   *StatusWriter
	settings kvcached.Settings
	said     bool
}

// Logged once a buffer that is mapped in full does not fit, so while a model is being loaded.
var kvcachedNoRoom = regexp.MustCompile(`(?m)kvcached: (\S+ [^:\n]+): no room for (\d+) bytes: KVCACHED_E_LIMIT`)

func (o *kvcachedOutput) Write(b []byte) (int, error) {
	if !o.said && bytes.Contains(b, []byte("KVCACHED_E_LIMIT")) {
		if match := kvcachedNoRoom.FindSubmatch(b); match != nil {
			o.said = true
			size, _ := strconv.ParseUint(string(match[2]), 10, 64)
			limit, source := "the default", ""
			if o.settings.Limit != kvcached.NoLimit {
				limit, source = kvcached.FormatSize(o.settings.Limit), ", set by "+o.settings.Source
			}
			defer o.status.AppendError(fmt.Sprintf("kvcached: no room for %s (%s) beside what is charged: the limit for all models together is %s%s; raise it, or use a smaller model or context",
				kvcached.FormatSize(size), match[1], limit, source))
		}
	}
	return o.inner.Write(b)
}

// kvcachedTransport stands between a runner and its child. It tells the child what context a request may use, and makes an
// answer that the child ends for want of memory end with that error: llama-server says so in an event of the stream, which
// Ollama passes over, so that the client would get a short answer, or none, and take it for a good one.
type kvcachedTransport struct{ http.RoundTripper }

func (t kvcachedTransport) RoundTrip(request *http.Request) (*http.Response, error) {
	next := t.RoundTripper
	if next == nil {
		next = http.DefaultTransport
	}
	request, err := kvcachedWithContext(request)
	if err != nil {
		return nil, err
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
