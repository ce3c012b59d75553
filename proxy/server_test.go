package proxy_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nnsight-go/nnsight-go/engine"
	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/server"
	"github.com/nnsight-go/nnsight-go/engine/server/jobs"
	"github.com/nnsight-go/nnsight-go/engine/server/keys"
	"github.com/nnsight-go/nnsight-go/engine/server/servertest"
	"github.com/nnsight-go/nnsight-go/engine/server/work"
	"github.com/nnsight-go/nnsight-go/proxy"
	"github.com/stretchr/testify/require"
	torch "github.com/wangkuiyi/gotorch"
)

// site is a server of a small model, which refuses as often as it is told to.
type site struct {
	*proxy.Server
	url  string
	busy atomic.Int32
	keys *keys.Store
}

func serve(t *testing.T, known *keys.Store, key string, o work.Options) *site {
	m, err := engine.Open(enginetest.Directory(t, enginetest.GPT2, 1), engine.Options{Load: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	h, _, _ := servertest.Start(t, map[string]*engine.Model{"m": m}, jobs.Options{}, server.Options{Keys: known}, o)
	s := &site{keys: known}
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if s.busy.Add(-1) >= 0 {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		h.ServeHTTP(w, r)
	}))
	t.Cleanup(web.Close)
	s.url = web.URL
	s.Server, err = proxy.Dial(web.URL+"/", key)
	require.NoError(t, err)
	return s
}

func TestTracesThereAreThoseHere(t *testing.T) {
	here := open(t, enginetest.GPT2)
	s := serve(t, nil, "", work.Options{})
	there := s.Model("m", here)
	require.Eventually(t, func() bool {
		found, err := s.Models(t.Context())
		require.NoError(t, err)
		require.Equal(t, []proxy.Hosted{{Name: "m", Architecture: "GPT2LMHeadModel", DType: "float32", Context: 32, Workers: found[0].Workers}}, found)
		return found[0].Workers == 1
	}, 20*time.Second, 10*time.Millisecond)
	ran := 0
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 7))
		one, made := draw(r, 0)
		two, _ := draw(r, made)
		outcome := func(m proxy.Model) (out [][]float32, err error) {
			tr, values := proxy.New(m), map[int]any{}
			saved := record(tr.Invoke("w01 w02 w03"), one, values, 0)
			saved = append(saved, record(tr.Invoke("w04 w05"), two, values, made)...)
			if err := tr.Run(t.Context()); err != nil {
				return nil, err
			}
			for _, v := range saved {
				out = append(out, floats(t, v.Tensor()))
			}
			return out, nil
		}
		want, wrong := outcome(here)
		got, err := outcome(there)
		if wrong != nil {
			require.Error(t, err)
			require.Equal(t, fault.As(wrong).Code, fault.As(err).Code)
			require.Equal(t, fault.As(wrong).Pos, fault.As(err).Pos, "the line of the program")
			require.Equal(t, fault.As(wrong).Message, fault.As(err).Message)
			continue
		}
		require.NoError(t, err)
		ran++
		for i := range want {
			require.InDeltaSlice(t, want[i], got[i], 1e-4, "seed %d", seed)
		}
	}
	require.Greater(t, ran, 20)
}

func TestGradientsThere(t *testing.T) {
	here := open(t, enginetest.GPT2)
	gradients := func(m proxy.Model) (out [2][]float32) {
		added := torch.Full([]int64{16}, 0.5, true)
		tr := proxy.New(m)
		in := tr.InvokeIDs([]int64{1, 2, 3})
		h := in.Module("transformer.h.1").Output("0")
		v := h.Add(added)
		h.SetIndex(v, proxy.All)
		b := in.Module("lm_head").Output("").Call("sum").Backward(proxy.BackwardOptions{})
		first, second := b.Grad(h).Save(), v.Save()
		run(t, tr)
		return [2][]float32{floats(t, first.Tensor()), floats(t, second.Tensor())}
	}
	want, got := gradients(here), gradients(serve(t, nil, "", work.Options{}).Model("m", nil))
	for i := range want {
		require.InDeltaSlice(t, want[i], got[i], 1e-4)
	}
}

func TestGenerationsThere(t *testing.T) {
	here := open(t, enginetest.GPT2)
	there := serve(t, nil, "", work.Options{}).Model("m", here)
	one, err := aten.RandomState("cpu")
	require.NoError(t, err)
	defer one.Free()
	_, err = proxy.Generate(here, proxy.Settings{MaxNewTokens: 1, Sample: true}, "w01").Run(t.Context())
	require.NoError(t, err)
	other, err := aten.RandomState("cpu")
	require.NoError(t, err)
	defer other.Free()
	for name, s := range map[string]proxy.Settings{
		"greedy":  {MaxNewTokens: 8},
		"ends":    {MaxNewTokens: 12, EOS: []int64{3, 5, 7, 9, 11}, Pad: 2},
		"sampled": {MaxNewTokens: 8, Sample: true, Temperature: 1.5, Returned: 2},
		"beams":   {MaxNewTokens: 6, Beams: 3, Returned: 2, LengthPenalty: 1, EarlyStopping: "false"},
		"long":    {MaxNewTokens: 10, MinNewTokens: 10},
	} {
		for _, edited := range []bool{false, true} {
			outcome := func(m proxy.Model) (rows, drawn [][]int64, hidden [][]float32) {
				require.NoError(t, aten.SetRandomState("cpu", one))
				g := proxy.Generate(m, s, "w01 w02 w03", "w04")
				if edited {
					var last *proxy.Value
					g.Each(func(s *proxy.Step) {
						h := s.Module("transformer.h.1").Output("0")
						if s.Number > 0 && last.Tensor().T != nil { // a value of the step before
							h.SetIndex(h.Mul(0.5), proxy.All)
						}
						last = h.Index(proxy.All, -1).Save()
					})
					g.After(func(s *proxy.Step) error {
						drawn, hidden = append(drawn, s.Tokens()), append(hidden, floats(t, last.Tensor()))
						if s.Number == 1 { // the program draws from the same generator
							return aten.SetRandomState("cpu", other)
						}
						return nil
					})
				}
				rows, err := g.Run(t.Context())
				require.NoError(t, err, name)
				return rows, drawn, hidden
			}
			rows, drawn, hidden := outcome(here)
			before, err := aten.RandomState("cpu")
			require.NoError(t, err)
			theirs, theirDrawn, theirHidden := outcome(there)
			after, err := aten.RandomState("cpu")
			require.NoError(t, err)
			require.Equal(t, rows, theirs, "%s, edited %v", name, edited)
			require.Equal(t, drawn, theirDrawn)
			for i := range hidden {
				require.InDeltaSlice(t, hidden[i], theirHidden[i], 1e-4)
			}
			wanted, err := before.AppendBytes(nil)
			require.NoError(t, err)
			left, err := after.AppendBytes(nil)
			require.NoError(t, err)
			require.Equal(t, wanted, left, "the generator is where it would be")
			before.Free()
			after.Free()
		}
	}
	tokens := 0
	g := proxy.Generate(there, proxy.Settings{MaxNewTokens: 5}, "w01")
	for d := range g.Stream(t.Context()) {
		require.NotEmpty(t, d.Text[0])
		tokens++
	}
	require.NoError(t, g.Err())
	require.Equal(t, 5, tokens)
}

func TestJobs(t *testing.T) {
	s := serve(t, nil, "", work.Options{})
	m := s.Model("m", nil)
	tr := proxy.New(m)
	saved := tr.InvokeIDs([]int64{1, 2}).Module("lm_head").Output("").Save()
	job, err := tr.Submit(t.Context())
	require.NoError(t, err)
	require.NoError(t, job.Wait(t.Context()))
	state, err := job.State(t.Context())
	require.NoError(t, err)
	require.Equal(t, "COMPLETED", state)
	require.Equal(t, []int64{1, 2, 24}, saved.Tensor().Shape())
	require.NoError(t, job.Cancel(t.Context()), "which has no effect now")
	_, err = tr.Submit(t.Context())
	require.ErrorContains(t, err, "has run")

	here := open(t, enginetest.GPT2)
	_, err = proxy.New(here).Submit(t.Context())
	require.ErrorContains(t, err, "open here")
}

func TestServersThatAreBusyOrGone(t *testing.T) {
	s := serve(t, nil, "", work.Options{})
	trace := func(ctx context.Context, m proxy.Model) error {
		tr := proxy.New(m)
		tr.InvokeIDs([]int64{1, 2}).Module("lm_head").Output("").Save()
		return tr.Run(ctx)
	}
	s.busy.Store(2)
	require.NoError(t, trace(t.Context(), s.Model("m", nil)))
	require.Negative(t, s.busy.Load())

	err := trace(t.Context(), s.Model("other", nil))
	require.ErrorContains(t, err, `no model "other"`)
	tr := proxy.New(s.Model("m", nil))
	tr.Invoke("w01").Module("lm_head").Output("").Save()
	require.ErrorContains(t, tr.Run(t.Context()), "no tokenizer")

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err = trace(ctx, s.Model("m", nil))
	require.Equal(t, fault.Cancelled, fault.As(err).Code)
	require.True(t, errors.Is(err, context.Canceled))

	for _, address := range []string{"", "host:80", "ftp://host", "http://"} {
		_, err := proxy.Dial(address, "")
		require.ErrorContains(t, err, "no address")
	}
	gone := httptest.NewServer(nil)
	gone.Close()
	nowhere, err := proxy.Dial(gone.URL, "")
	require.NoError(t, err)
	_, err = nowhere.Models(t.Context())
	require.ErrorContains(t, err, "cannot be reached")
}

func TestAJobThatNobodyWaitsForIsCancelled(t *testing.T) {
	s := serve(t, nil, "", work.Options{})
	g := proxy.GenerateIDs(s.Model("m", nil), proxy.Settings{MaxNewTokens: 20}, []int64{1})
	ctx, cancel := context.WithCancel(t.Context())
	g.After(func(s *proxy.Step) error {
		if s.Number == 3 {
			cancel()
		}
		return nil
	})
	_, err := g.Run(ctx)
	require.Equal(t, fault.Cancelled, fault.As(err).Code, err)

	// one that runs: its worker is told
	tr := proxy.New(s.Model("m", nil))
	in := tr.InvokeIDs([]int64{1, 2})
	x := in.Module("lm_head").Output("")
	for range 20000 {
		x = x.Add(1)
	}
	x.Save()
	ctx, stop := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer stop()
	err = tr.Run(ctx)
	require.Equal(t, fault.Cancelled, fault.As(err).Code, err)
	require.Eventually(t, func() bool {
		found, err := s.Models(t.Context())
		return err == nil && found[0].Waiting == 0
	}, 20*time.Second, 20*time.Millisecond)
}

func TestKeysOfGoPrograms(t *testing.T) {
	known := keys.Open(filepath.Join(t.TempDir(), "keys.json"))
	key, _, err := known.Create(keys.Key{Name: "Ada"})
	require.NoError(t, err)
	s := serve(t, known, key, work.Options{})
	tr := proxy.New(s.Model("m", nil))
	tr.InvokeIDs([]int64{1, 2}).Module("lm_head").Output("").Save()
	run(t, tr)
	other, err := proxy.Dial(s.url, "wrong")
	require.NoError(t, err)
	_, err = other.Models(t.Context())
	require.ErrorContains(t, err, "API key")
	require.False(t, strings.Contains(err.Error(), "wrong"))
}
