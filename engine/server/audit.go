package server

import (
	"cmp"
	"context"
	"io"
	"log/slog"
	"net/http"
	"time"
)

// An audit says who asked for what and how it went: a line of JSON for each request that takes a key, those that were
// turned away among them. What a request carries, and what came of it, is not in it.

// auditor writes an audit; nil writes none.
type auditor struct{ log *slog.Logger }

func newAuditor(w io.Writer) *auditor {
	if w == nil {
		return nil
	}
	return &auditor{slog.New(slog.NewJSONHandler(w, nil))}
}

// watched notes what is answered.
type watched struct {
	http.ResponseWriter
	status int
	bytes  int64
	model  string // that it is about, where the path does not say
}

// names notes the model that a request is about.
func names(w http.ResponseWriter, model string) {
	if seen, ok := w.(*watched); ok {
		seen.model = model
	}
}

func (w *watched) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *watched) Write(data []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	n, err := w.ResponseWriter.Write(data)
	w.bytes += int64(n)
	return n, err
}

// Unwrap lets [http.ResponseController] reach what is below.
func (w *watched) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// about is an audit of what h answers. Whoever h finds out to have asked goes into who.
func (d *auditor) about(h func(w http.ResponseWriter, r *http.Request) (who string)) http.HandlerFunc {
	if d == nil {
		return func(w http.ResponseWriter, r *http.Request) { h(w, r) }
	}
	return func(w http.ResponseWriter, r *http.Request) {
		began, seen := time.Now(), &watched{ResponseWriter: w}
		who := h(seen, r)
		id := cmp.Or(r.PathValue("id"), seen.Header().Get("Nnsight-Job"))
		what := []slog.Attr{slog.String("from", r.RemoteAddr), slog.String("key", who), slog.Int("status", seen.status),
			slog.Int64("received", max(r.ContentLength, 0)), slog.Int64("sent", seen.bytes), slog.Float64("seconds", time.Since(began).Seconds())}
		if id != "" {
			what = append(what, slog.String("job", id))
		}
		if name := cmp.Or(seen.model, r.PathValue("name")); name != "" {
			what = append(what, slog.String("model", name))
		}
		d.log.LogAttrs(context.Background(), slog.LevelInfo, r.Pattern, what...)
	}
}
