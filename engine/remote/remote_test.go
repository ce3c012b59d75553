package remote

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/gen"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/host"
	"github.com/stretchr/testify/require"
)

func open(t *testing.T) *host.Native {
	m, err := host.Open(enginetest.Directory(t, enginetest.GPT2, 1), host.Options{Prepack: -1})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	return m
}

// wire is the file of a request: its JSON and other tensors.
func wire(t testing.TB, request any, parts map[string][]byte, tensors map[string]aten.Tensor) []byte {
	var w Writer
	text, err := json.Marshal(request)
	require.NoError(t, err)
	w.Bytes("request", text)
	for name, part := range parts {
		w.Bytes(name, part)
	}
	for name, tensor := range tensors {
		require.NoError(t, w.Tensor(name, tensor))
	}
	out, err := w.File()
	require.NoError(t, err)
	return out
}

// doubled is a trace that saves what the second block gives, twice it, and a constant times it.
func doubled() *graph.Graph {
	read := graph.Node{Kind: graph.KindRead, Path: "transformer.h.1", Port: graph.PortOutput, Leaf: "0", Pos: -1}
	call := func(op string, args ...graph.Arg) graph.Node {
		return graph.Node{Kind: graph.KindCall, Op: op, Args: args, Pos: -1}
	}
	save := func(id graph.ID) graph.Node {
		return graph.Node{Kind: graph.KindSave, Args: []graph.Arg{graph.Ref(id)}, Pos: -1}
	}
	return &graph.Graph{
		Invokes: []graph.Invoke{{Rows: [][]int64{{1, 2, 3}}}},
		Nodes: []graph.Node{read, call("aten::add.Tensor", graph.Ref(0), graph.Ref(0)), {Kind: graph.KindConst, Pos: -1},
			call("aten::mul.Tensor", graph.Ref(0), graph.Ref(2)), save(0), save(1), save(3)},
	}
}

// response reads what came back of each step: the tensors of its results.
func response(t *testing.T, data []byte) (Response, [][][]float32) {
	f, err := readFile(data)
	require.NoError(t, err)
	text, err := f.text("response")
	require.NoError(t, err)
	var r Response
	require.NoError(t, json.Unmarshal(text, &r))
	var all [][][]float32
	for _, s := range r.Steps {
		var values [][]float32
		if s.Results != "" {
			raw, err := f.text(s.Results)
			require.NoError(t, err)
			results, err := graph.DecodeResults(raw, len(s.Tensors))
			require.NoError(t, err)
			for _, result := range results {
				tensor, err := f.tensor(s.Tensors[result.Value.Ref])
				require.NoError(t, err)
				numbers, err := tensor.Float32s()
				tensor.Free()
				require.NoError(t, err)
				values = append(values, numbers)
			}
		}
		all = append(all, values)
	}
	return r, all
}

func trace(step Step) Request {
	return Request{Version: 1, Model: "m", Kind: Trace, Steps: []Step{step}}
}

func perform(t *testing.T, p *Performer, data []byte) ([]byte, error) {
	r, err := Parse(data, p.Limits)
	if err != nil {
		return nil, err
	}
	return p.Perform(t.Context(), "somebody", r)
}

func TestATraceThatArrivesEqualsOneThatIsHere(t *testing.T) {
	m := open(t)
	three, err := aten.FromFloat32s([]float32{3})
	require.NoError(t, err)
	defer three.Free()
	p := &Performer{Model: m}
	request := trace(Step{Program: []string{"g"}, Constants: []Constant{{Tensor: "c"}}, End: true, Want: []string{"results"}})
	live := aten.Live()
	for range 3 { // planned anew, and known
		out, err := perform(t, p, wire(t, request, map[string][]byte{"g": graph.Encode(doubled())}, map[string]aten.Tensor{"c": three}))
		require.NoError(t, err)
		_, values := response(t, out)
		require.Len(t, values[0], 3)
		for i, x := range values[0][0] {
			require.Equal(t, 2*x, values[0][1][i])
			require.InDelta(t, 3*x, values[0][2][i], 1e-6)
		}
	}
	loaded := aten.Live()
	_, err = perform(t, p, wire(t, request, map[string][]byte{"g": graph.Encode(doubled())}, map[string]aten.Tensor{"c": three}))
	require.NoError(t, err)
	require.Equal(t, loaded, aten.Live())
	require.Greater(t, loaded, live)
}

func TestParametersAndUploads(t *testing.T) {
	m := open(t)
	weight, err := m.Constant("transformer.ln_f.weight")
	require.NoError(t, err)
	defer weight.Free()
	want, err := weight.Float32s()
	require.NoError(t, err)
	var asked string
	upload := func(hash string) (Blob, error) {
		asked = hash
		data, err := weight.AppendBytes(nil)
		return Blob{DType: "float32", Shape: weight.Shape(), Data: data}, err
	}
	p := &Performer{Model: m}
	for name, c := range map[string]Constant{"parameter": {Parameter: "transformer.ln_f.weight"}, "upload": {Hash: "abc", Grad: true}} {
		r, err := Parse(wire(t, trace(Step{Program: []string{"g"}, Constants: []Constant{c}, End: true, Want: []string{"results"}}),
			map[string][]byte{"g": graph.Encode(doubled())}, nil), Limits{})
		require.NoError(t, err, name)
		r.Upload = upload
		out, err := p.Perform(t.Context(), "somebody", r)
		require.NoError(t, err, name)
		_, values := response(t, out)
		require.InDelta(t, want[0]*values[0][0][0], values[0][2][0], 1e-6, name)
	}
	require.Equal(t, "abc", asked)
	_, err = perform(t, p, wire(t, trace(Step{Program: []string{"g"}, Constants: []Constant{{Parameter: "transformer.ln_f.wait"}}, End: true}),
		map[string][]byte{"g": graph.Encode(doubled())}, nil))
	require.ErrorContains(t, err, "transformer.ln_f.weight")
}

// generation is a request for a number of steps, of which the last tells all.
func generation(t *testing.T, steps int, chain string, sample bool) Request {
	s := gen.Settings{MaxNewTokens: 6, Pad: 0, Sample: sample, Temperature: 1, LengthPenalty: 1, EarlyStopping: "false"}
	r := Request{Version: 1, Model: "m", Kind: Generate, Prompt: &Prompt{Rows: [][]int64{{1, 2, 3}}}, Settings: &s, Chain: chain}
	for range steps {
		r.Steps = append(r.Steps, Step{End: true})
	}
	r.Steps[steps-1].Want = []string{WantDrawn, WantResults}
	if sample {
		r.Random = "random"
	}
	return r
}

func TestAGenerationGoesOn(t *testing.T) {
	m := open(t)
	require.NoError(t, m.Load())
	random, err := aten.RandomState("cpu")
	require.NoError(t, err)
	defer random.Free()
	live := aten.Live()
	for _, sample := range []bool{false, true} {
		var want []int64
		for _, chains := range []*Chains{nil, NewChains(4, time.Minute)} {
			p := &Performer{Model: m, Chains: chains, Limits: Limits{Work: 1e12, Memory: 1 << 30, Output: 1 << 20}}
			var got []int64
			for k := 1; k <= 6; k++ {
				out, err := perform(t, p, wire(t, generation(t, k, "c", sample), nil, map[string]aten.Tensor{"random": random}))
				require.NoError(t, err)
				r, _ := response(t, out)
				require.Len(t, r.Steps, 1)
				require.Equal(t, k-1, r.Steps[0].Step)
				require.Equal(t, k == 6, r.Steps[0].Drawn.Done)
				got = append(got, r.Steps[0].Drawn.Tokens...)
			}
			if want == nil {
				want = got
			}
			require.Equal(t, want, got, "kept between requests or begun anew, the tokens are the same")
			if chains != nil {
				require.Empty(t, chains.kept, "the last step ends it")
				out, err := perform(t, p, wire(t, generation(t, 2, "d", sample), nil, map[string]aten.Tensor{"random": random}))
				require.NoError(t, err)
				require.NotEmpty(t, out)
				require.Len(t, chains.kept, 1)
				chains.Close()
				require.Empty(t, chains.kept)
			}
		}
	}
	require.Equal(t, live, aten.Live())
}

// A chain whose first request had a generator, and whose next one has none.
func TestAChainLeavesTheGeneratorAlone(t *testing.T) {
	p := &Performer{Model: open(t), Chains: NewChains(4, time.Minute)}
	defer p.Chains.Close()
	settings := gen.Settings{MaxNewTokens: 5, Temperature: 1}
	settings.Sample = true
	one := Request{Version: 1, Model: "m", Kind: Generate, Settings: &settings, Prompt: &Prompt{Rows: [][]int64{{1, 2}}},
		Chain: "c", Random: "random", Steps: []Step{{End: true}}}
	other := anotherState(t, rand.New(rand.NewPCG(1, 2)))
	defer other.Free()
	_, err := perform(t, p, wire(t, one, nil, map[string]aten.Tensor{"random": other}))
	require.NoError(t, err)
	anotherState(t, rand.New(rand.NewPCG(3, 2))).Free()
	state := func() []byte {
		s, err := aten.RandomState("cpu")
		require.NoError(t, err)
		defer s.Free()
		b, err := s.AppendBytes(nil)
		require.NoError(t, err)
		return b
	}
	before := state()
	settings.Sample, one.Random, one.Steps = false, "", []Step{{End: true}, {End: true, Want: []string{WantDrawn}}}
	_, err = perform(t, p, wire(t, one, nil, nil))
	require.NoError(t, err)
	require.True(t, bytes.Equal(before, state()))
}

func TestAGenerationNobodyAsksForIsForgotten(t *testing.T) {
	m := open(t)
	chains := NewChains(4, time.Millisecond)
	_, err := perform(t, &Performer{Model: m, Chains: chains}, wire(t, generation(t, 1, "c", false), nil, nil))
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		chains.mu.Lock()
		defer chains.mu.Unlock()
		return len(chains.kept) == 0
	}, 10*time.Second, time.Millisecond)
}

func TestScoresAreTheClientsToChange(t *testing.T) {
	m := open(t)
	p := &Performer{Model: m}
	r := generation(t, 1, "", false)
	r.Steps[0].Want = []string{WantScores}
	out, err := perform(t, p, wire(t, r, nil, nil))
	require.NoError(t, err)
	answer, _ := response(t, out)
	f, err := readFile(out)
	require.NoError(t, err)
	scores, err := f.tensor(answer.Steps[0].Scores)
	require.NoError(t, err)
	defer scores.Free()
	numbers, err := scores.Float32s()
	require.NoError(t, err)
	for i := range numbers {
		numbers[i] = 0
	}
	numbers[17] = 1
	changed, err := aten.FromFloat32s(numbers, scores.Shape()...)
	require.NoError(t, err)
	defer changed.Free()
	r.Steps[0].Want, r.Steps[0].Scores = []string{WantDrawn, WantLeft}, "s"
	out, err = perform(t, p, wire(t, r, nil, map[string]aten.Tensor{"s": changed}))
	require.NoError(t, err)
	answer, _ = response(t, out)
	require.Equal(t, []int64{17}, answer.Steps[0].Drawn.Tokens)
	require.NotEmpty(t, answer.Steps[0].Left)
}

func TestWhatTheClientSaysOfAStepLater(t *testing.T) {
	m := open(t)
	require.NoError(t, m.Load())
	random, err := aten.RandomState("cpu")
	require.NoError(t, err)
	defer random.Free()
	live := aten.Live()
	var want [][]int64
	for _, chains := range []*Chains{nil, NewChains(4, time.Minute)} {
		p := &Performer{Model: m, Chains: chains}
		ask := func(r Request, tensors map[string]aten.Tensor) (Response, file) {
			tensors["random"] = random
			out, err := perform(t, p, wire(t, r, nil, tensors))
			require.NoError(t, err)
			answer, _ := response(t, out)
			f, err := readFile(out)
			require.NoError(t, err)
			return answer, f
		}
		var got [][]int64
		r := generation(t, 1, "c", true)
		r.Prompt.Rows, r.Settings.EOS, r.Settings.Pad = [][]int64{{1, 2, 3}, {3, 2, 1}}, []int64{99}, 5 // never drawn: rows end when the client says so
		sent := map[string]aten.Tensor{}
		for k := range 4 {
			last := &r.Steps[k]
			last.Want = []string{WantScores}
			answer, f := ask(r, sent) // the scores come back ...
			if chains != nil {
				require.Len(t, chains.kept, 1, "the step is kept")
			}
			scores, err := f.tensor(answer.Steps[0].Scores)
			require.NoError(t, err)
			defer scores.Free()
			last.Want, last.Scores = []string{WantDrawn}, string(rune('a'+k))
			sent[last.Scores] = scores
			if k == 2 { // something else has drawn in between
				last.Random = "random"
			}
			answer, _ = ask(r, sent) // ... and tokens are drawn from them
			got = append(got, answer.Steps[0].Drawn.Tokens)
			last.Want = nil
			if k == 1 {
				last.Ended = []bool{true, false}
			}
			r.Steps = append(r.Steps, Step{End: true})
		}
		require.Equal(t, int64(5), got[2][0], "a row that has ended is filled up")
		if want == nil {
			want = got
		}
		require.Equal(t, want, got)
		if chains != nil {
			chains.Close()
		}
	}
	require.LessOrEqual(t, aten.Live(), live+8) // the scores of this test
}

func TestBadRequests(t *testing.T) {
	m := open(t)
	require.NoError(t, m.Load())
	g := map[string][]byte{"g": graph.Encode(doubled())}
	step := Step{Program: []string{"g"}, Constants: []Constant{{Tensor: "c"}}, End: true, Want: []string{"results"}}
	one, err := aten.FromFloat32s([]float32{1})
	require.NoError(t, err)
	defer one.Free()
	c := map[string]aten.Tensor{"c": one}
	live := aten.Live()
	later := trace(step)
	later.Version = 2
	several := trace(step)
	several.Steps = append(several.Steps, step)
	odd := trace(step)
	odd.Kind = "magic"
	without := generation(t, 1, "", false)
	without.Settings = nil
	much := generation(t, 1, "", false)
	much.Settings.MaxNewTokens = 1 << 30
	wide := generation(t, 1, "", false)
	wide.Settings.Beams = 1 << 20
	drawn := generation(t, 1, "", true)
	drawn.Random = "nothing"
	scored := generation(t, 2, "", false)
	scored.Steps[0].Want = []string{WantScores}
	alone := generation(t, 1, "", false)
	alone.Steps[0].Random = "c"
	unended := generation(t, 2, "", false)
	unended.Steps[0].End = false
	for says, data := range map[string][]byte{
		"too few for a header":          {1, 2, 3},
		"version 1":                     wire(t, later, g, c),
		"one step":                      wire(t, several, g, c),
		`no kind "magic"`:               wire(t, odd, g, c),
		`unknown field "pickle"`:        wire(t, map[string]any{"pickle": "gASV"}, g, c),
		`no tensor "g"`:                 wire(t, trace(step), nil, c),
		`no tensor "c"`:                 wire(t, trace(step), g, nil),
		"not bytes":                     wire(t, trace(Step{Program: []string{"c"}}), nil, c),
		"the graph cannot be read":      wire(t, trace(step), map[string][]byte{"g": {1}}, c),
		"a prompt and settings":         wire(t, without, nil, nil),
		"new tokens were asked for":     wire(t, much, nil, nil),
		"rows of each prompt":           wire(t, wide, nil, nil),
		`no tensor "nothing"`:           wire(t, drawn, nil, nil),
		"step 0 has no end":             wire(t, unended, nil, nil),
		"wait for scores":               wire(t, scored, nil, nil),
		"and the request none":          wire(t, alone, nil, c),
		"this server takes 2 at once":   nil,
		"a job may send":                nil,
		"there are none here":           wire(t, trace(Step{Program: []string{"g"}, Constants: []Constant{{Hash: "x"}}, End: true}), g, nil),
		"file cannot be read: its head": bytes.Repeat([]byte{0xff}, 64),
	} {
		p := &Performer{Model: m, Limits: Limits{NewTokens: 100}}
		switch says {
		case "this server takes 2 at once":
			p.Limits.Tokens, data = 2, wire(t, trace(step), g, c)
		case "a job may send":
			p.Limits.Output, data = 16, wire(t, trace(step), g, c)
		}
		_, err := perform(t, p, data)
		require.ErrorContains(t, err, says)
		require.Contains(t, []fault.Code{fault.Remote, fault.Graph}, fault.As(err).Code, says)
		require.Equal(t, live, aten.Live(), says)
	}
}

func TestAGraphIsLookedAtFirst(t *testing.T) {
	g := doubled()
	g.Nodes[1].Op = "aten::from_file.default"
	_, err := Parse(wire(t, trace(Step{Program: []string{"g"}}), map[string][]byte{"g": graph.Encode(g)}, nil), Limits{})
	require.Equal(t, fault.Remote, fault.As(err).Code)
	require.ErrorContains(t, err, "aten::from_file")
}

func TestWhatIsCancelledEnds(t *testing.T) {
	m := open(t)
	one, err := aten.FromFloat32s([]float32{1})
	require.NoError(t, err)
	defer one.Free()
	require.NoError(t, m.Load())
	live := aten.Live()
	r, err := Parse(wire(t, trace(Step{Program: []string{"g"}, Constants: []Constant{{Tensor: "c"}}, End: true}),
		map[string][]byte{"g": graph.Encode(doubled())}, map[string]aten.Tensor{"c": one}), Limits{})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = (&Performer{Model: m}).Perform(ctx, "", r)
	require.Equal(t, fault.Cancelled, fault.As(err).Code)
	late, stop := context.WithTimeoutCause(t.Context(), 0, fault.New(fault.Remote, "it took too long"))
	defer stop()
	<-late.Done()
	_, err = (&Performer{Model: m}).Perform(late, "", r)
	require.ErrorContains(t, err, "too long")
	require.Equal(t, live, aten.Live())
}

func TestRequestsThatShareAPass(t *testing.T) {
	m := open(t)
	require.NoError(t, m.Load())
	p := &Performer{Model: m}
	random := rand.New(rand.NewPCG(1, 2))
	requests := func(n int) (out []*Request) {
		for range n {
			g := doubled()
			g.Invokes = nil
			for range 1 + random.IntN(2) {
				row := make([]int64, 1+random.IntN(9))
				for i := range row {
					row[i] = random.Int64N(4) // so that some begin alike
				}
				g.Invokes = append(g.Invokes, graph.Invoke{Rows: [][]int64{row}})
			}
			if random.IntN(2) == 0 { // changes what the later block sees, of its own rows alone
				g.Nodes = append(g.Nodes[:4:4], graph.Node{Kind: graph.KindCall, Op: "aten::mul_.Tensor", Args: []graph.Arg{graph.Ref(0), graph.Ref(2)}, Pos: -1},
					graph.Node{Kind: graph.KindRead, Path: "transformer.h.2", Port: graph.PortOutput, Leaf: "0", Pos: -1},
					graph.Node{Kind: graph.KindSave, Args: []graph.Arg{graph.Ref(5)}, Pos: -1},
					graph.Node{Kind: graph.KindSave, Args: []graph.Arg{graph.Ref(3)}, Pos: -1})
			}
			c, err := aten.FromFloat32s([]float32{random.Float32()})
			require.NoError(t, err)
			r, err := Parse(wire(t, trace(Step{Program: []string{"g"}, Constants: []Constant{{Tensor: "c"}}, End: true, Want: []string{"results"}}),
				map[string][]byte{"g": graph.Encode(g)}, map[string]aten.Tensor{"c": c}), Limits{})
			c.Free()
			require.NoError(t, err)
			require.NotNil(t, r.Company())
			out = append(out, r)
		}
		return out
	}
	live := aten.Live()
	for round := range 40 {
		all := requests(1 + random.IntN(8))
		together, err := p.PerformTogether(t.Context(), all)
		require.NoError(t, err)
		require.Len(t, together, len(all))
		for i, r := range all {
			alone, err := p.Perform(t.Context(), "", r)
			require.NoError(t, err)
			head, got := response(t, together[i])
			wantHead, want := response(t, alone)
			require.Equal(t, wantHead, head)
			for k := range want[0] {
				require.Len(t, got[0][k], len(want[0][k]))
				require.InDeltaSlice(t, want[0][k], got[0][k], 1e-5, "round %d, request %d, value %d", round, i, k)
			}
		}
		require.Equal(t, live, aten.Live())
	}
	// one that fails takes the others' pass with it, and leaves nothing
	bad := requests(3)
	bad[1].programs[0].graph.Nodes[0].Path = "transformer.h.9"
	_, err := p.PerformTogether(t.Context(), bad)
	require.ErrorContains(t, err, "transformer.h.9")
	bad = requests(3)
	bad[2].Steps[0].Constants = nil
	_, err = p.PerformTogether(t.Context(), bad)
	require.ErrorContains(t, err, "constant 0")
	require.Equal(t, live, aten.Live())
}

func TestWhatSharesNoPass(t *testing.T) {
	step := Step{Program: []string{"g"}, Constants: []Constant{{Tensor: "c"}}, End: true}
	whole := func(change func(*graph.Graph)) *Request {
		g := doubled()
		change(g)
		r, err := Parse(wire(t, trace(step), map[string][]byte{"g": graph.Encode(g)}, nil), Limits{})
		require.NoError(t, err)
		return r
	}
	require.NotNil(t, whole(func(*graph.Graph) {}).Company())
	require.Nil(t, whole(func(g *graph.Graph) { g.Invokes = append(g.Invokes, graph.Invoke{}) }).Company(), "it sees the whole batch")
	require.Nil(t, whole(func(g *graph.Graph) {
		g.Nodes[4] = graph.Node{Kind: graph.KindTrack, Args: []graph.Arg{graph.Ref(0), graph.Int(0)}, Pos: -1}
	}).Company(), "gradients")
	r := whole(func(*graph.Graph) {})
	r.Steps[0].End = false
	require.Nil(t, r.Company(), "a value in the middle")
	require.Nil(t, whole(func(g *graph.Graph) {
		for range mostLines {
			g.Nodes = append(g.Nodes, graph.Node{Kind: graph.KindCall, Op: "aten::mul_.Tensor", Args: []graph.Arg{graph.Ref(0), graph.Ref(0)}, Pos: -1})
		}
	}).Company(), "many lines")
}

// In a pass with padded rows positions have a row for each, and those of equal length have one for all alone.
func TestPositionsBesidePaddedRows(t *testing.T) {
	p := &Performer{Model: open(t)}
	g := &graph.Graph{Invokes: []graph.Invoke{{Rows: [][]int64{{1, 2, 3}, {4, 5, 6}}}}, Nodes: []graph.Node{
		{Kind: graph.KindRead, Path: "transformer.wpe", Port: graph.PortOutput, Pos: -1},
		{Kind: graph.KindSave, Args: []graph.Arg{graph.Ref(0)}, Pos: -1}}}
	parse := func() *Request {
		r, err := Parse(wire(t, trace(Step{Program: []string{"g"}, End: true, Want: []string{WantResults}}),
			map[string][]byte{"g": graph.Encode(g)}, nil), Limits{})
		require.NoError(t, err)
		return r
	}
	even := parse()
	want, err := p.Perform(t.Context(), "somebody", even)
	require.NoError(t, err)
	for _, invoke := range []graph.Invoke{
		{Rows: [][]int64{{1, 2, 3}, {4, 5}}}, {Rows: [][]int64{{1, 2}}, Masks: [][]int64{{0, 1}}}, {Rows: [][]int64{{1, 2}}, Masks: [][]int64{{1, 1}}},
	} {
		g.Invokes = []graph.Invoke{invoke}
		other := parse()
		if other.Company() == even.Company() {
			out, err := p.PerformTogether(t.Context(), []*Request{even, other})
			require.NoError(t, err)
			same(t, want, out[0])
		}
	}
}

// Steps of one program share it, and what all of them say is bounded.
func TestProgramsOfManySteps(t *testing.T) {
	r := generation(t, 1000, "", false)
	for i := range r.Steps {
		r.Steps[i].Program = []string{"g"}
	}
	g := graph.Graph{Invokes: []graph.Invoke{{}}, Nodes: slices.Repeat([]graph.Node{{Kind: graph.KindConst, Pos: -1}}, 1<<12)}
	parts := map[string][]byte{"g": graph.Encode(&g)}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err := Parse(wire(t, r, parts, nil), Limits{})
	require.NoError(t, err)
	runtime.ReadMemStats(&after)
	require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(100<<20))
	for i := range r.Steps {
		name := fmt.Sprint("g", i)
		r.Steps[i].Program, parts[name] = []string{name}, parts["g"]
	}
	_, err = Parse(wire(t, r, parts, nil), Limits{})
	require.ErrorContains(t, err, "what its programs say")
	_, err = Parse(wire(t, map[string]string{"model": strings.Repeat("m", mostText)}, nil, nil), Limits{})
	require.ErrorContains(t, err, "the request itself")
}

// No new tokens, or less, would make rows that take room and are not counted.
func TestNoNewTokens(t *testing.T) {
	for _, n := range []int{0, -1 << 40, 1 << 60} {
		r := generation(t, 1, "", false)
		r.Settings.MaxNewTokens, r.Settings.Returned, r.Prompt.Rows = n, 1024, slices.Repeat([][]int64{{}}, 1<<12)
		_, err := Parse(wire(t, r, nil, nil), Limits{Tokens: 1 << 16})
		require.ErrorContains(t, err, "new tokens were asked for")
		require.Equal(t, fault.Input, fault.As(err).Code)
	}
}

// An edit behind all invokes of a request would be one of the invoke that comes next: somebody else's.
func TestAnEditOfNobodysIsNotSomebodyElses(t *testing.T) {
	p := &Performer{Model: open(t)}
	parse := func(g *graph.Graph) *Request {
		r, err := Parse(wire(t, trace(Step{Program: []string{"g"}, End: true, Want: []string{"results"}}),
			map[string][]byte{"g": graph.Encode(g)}, nil), Limits{})
		require.NoError(t, err)
		return r
	}
	row := graph.Invoke{Rows: [][]int64{{1, 2, 3}}}
	read := graph.Node{Kind: graph.KindRead, Path: "transformer.h.0", Port: graph.PortOutput, Leaf: "0", Pos: -1}
	edit := read
	edit.Invoke = 1
	hostile := parse(&graph.Graph{Invokes: []graph.Invoke{row, {Edit: true}}, Nodes: []graph.Node{edit,
		{Kind: graph.KindCall, Op: "aten::zero_", Args: []graph.Arg{graph.Ref(0)}, Invoke: 1, Pos: -1}}})
	honest := parse(&graph.Graph{Invokes: []graph.Invoke{row}, Nodes: []graph.Node{read,
		{Kind: graph.KindSave, Args: []graph.Arg{graph.Ref(0)}, Pos: -1}}})
	_, err := p.Perform(t.Context(), "", hostile)
	require.ErrorContains(t, err, "followed by no invoke")
	require.Nil(t, hostile.Company())
	_, err = p.PerformTogether(t.Context(), []*Request{hostile, honest})
	require.ErrorContains(t, err, "an edit of nothing")
	require.NotNil(t, honest.Company())
}
