package server_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/server"
	"github.com/nnsight-go/nnsight-go/engine/server/work"
	"github.com/stretchr/testify/require"
)

// FuzzRoutes: whatever is asked of whatever route, there is an answer, errors are told as such and are not the
// server's own, and a body takes no more memory than it may.
func FuzzRoutes(f *testing.F) {
	const most = 64 << 10
	s := start(f, server.Options{Body: most}, work.Options{Time: 2 * time.Second})
	well := request(f, name, saved(1, 2))
	e, err := zstd.NewWriter(nil)
	require.NoError(f, err)
	packed := e.EncodeAll(well, nil)
	bomb := e.EncodeAll(make([]byte, 1<<26), nil)
	status, answer, _ := s.ask("POST", "/v1/jobs?wait=30", well)
	require.Equal(f, 200, status, string(answer))
	_, list, _ := s.ask("GET", "/v1/jobs", nil)
	var known struct{ Jobs []struct{ ID string } }
	require.NoError(f, json.Unmarshal(list, &known))
	id := known.Jobs[0].ID
	for _, seed := range []struct {
		method, target, encoding, mark string
		body                           []byte
	}{
		{"POST", "/v1/jobs?wait=30", "", "", well}, {"POST", "/v1/jobs", "zstd", "mark", packed}, {"POST", "/v1/jobs?wait=NaN", "zstd", "", bomb},
		{"POST", "/v1/jobs?wait=-1", "gzip", strings.Repeat("m", 300), well[:len(well)/2]}, {"GET", "/v1/jobs/" + id, "", "", nil},
		{"GET", "/v1/jobs/" + id + "/events", "", "", nil}, {"GET", "/v1/jobs/" + id + "/result?wait=1e9", "", "", nil},
		{"DELETE", "/v1/jobs/" + id, "", "", nil}, {"GET", "/v1/jobs/../../etc/passwd", "", "", nil}, {"GET", "/v1/models/" + name, "", "", nil},
		{"GET", "/v1/models/%00%2f..", "", "", nil}, {"PUT", "/v1/tensors/" + strings.Repeat("a", 64), "", "", well},
		{"HEAD", "/v1/tensors/*.>", "", "", nil}, {"GET", "/metrics", "", "", nil}, {"TRACE", "//", "", "", nil}, {"GET", "/v1/jobs/>/result", "", "", nil},
	} {
		f.Add(seed.method, seed.target, seed.encoding, seed.mark, seed.body)
	}
	f.Fuzz(func(t *testing.T, method, target, encoding, mark string, body []byte) {
		where, err := url.ParseRequestURI(target)
		if err != nil || !strings.HasPrefix(target, "/") {
			t.Skip()
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		base, err := url.Parse(s.url)
		require.NoError(t, err)
		where.Scheme, where.Host = base.Scheme, base.Host
		r, err := http.NewRequestWithContext(ctx, method, where.String(), bytes.NewReader(body))
		if err != nil {
			t.Skip()
		}
		r.Header.Set("Content-Encoding", encoding)
		r.Header.Set("Idempotency-Key", mark)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		answer, err := http.DefaultTransport.RoundTrip(r) // no redirections
		if err != nil {
			require.NotErrorIs(t, err, io.EOF, "the server hung up")
			return // the client would not send it
		}
		defer func() { _ = answer.Body.Close() }()
		data, err := io.ReadAll(answer.Body)
		require.NoError(t, err)
		runtime.ReadMemStats(&after)
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(32<<20), "bytes for one request")
		require.Less(t, answer.StatusCode, 500, string(data))
		if answer.StatusCode >= 400 && answer.StatusCode != 431 && method != http.MethodHead && strings.HasPrefix(answer.Header.Get("Content-Type"), "application/json") {
			var told struct{ Error *fault.Error }
			require.NoError(t, json.Unmarshal(data, &told), string(data))
			require.NotEmpty(t, told.Error.Message)
			require.NotEqual(t, fault.Internal, told.Error.Code, string(data))
		}
	})
}
