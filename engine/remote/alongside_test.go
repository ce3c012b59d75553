package remote

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/enginetest"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/gen"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/host"
	"github.com/stretchr/testify/require"
)

// likeSettings are those of a company, of one of several kinds.
func likeSettings(r *rand.Rand, kind int) gen.Settings {
	settings := gen.Settings{LengthPenalty: 1, EarlyStopping: "false", Temperature: 1, Pad: 2, MinNewTokens: r.IntN(3)}
	switch kind % 7 {
	case 1:
		settings.EOS = []int64{3, 5, 7, 9, 11, 13}
	case 2:
		settings.Repetition = 1.5
	case 3:
		settings.EOS, settings.NoRepeatNgram = []int64{4, 6, 8}, 2
	case 4:
		settings.EOS, settings.Repetition, settings.NoRepeatNgram = []int64{4, 6, 8, 10}, 1.3, 1
	case 5:
		settings.Sample, settings.Temperature, settings.TopK = true, 0.8, 12
	case 6:
		settings.Sample, settings.TopP, settings.EOS = true, 0.9, []int64{4, 6, 8}
	}
	return settings
}

// lines are a program of a step, by chance: it saves what a block gives, or changes it and saves what comes of it.
func lines(r *rand.Rand, block string) *graph.Graph {
	node := func(kind graph.Kind, path, leaf string, args ...graph.Arg) graph.Node {
		return graph.Node{Kind: kind, Path: path, Port: graph.PortOutput, Leaf: leaf, Args: args, Pos: -1}
	}
	call := func(op string, args ...graph.Arg) graph.Node {
		return graph.Node{Kind: graph.KindCall, Op: op, Args: args, Pos: -1}
	}
	g := &graph.Graph{Invokes: []graph.Invoke{{NoGrad: r.IntN(2) == 0}}, Nodes: []graph.Node{node(graph.KindRead, block, "0")}}
	switch r.IntN(4) {
	case 0: // the values alone
	case 1:
		g.Nodes = append(g.Nodes, call("aten::mul_.Scalar", graph.Ref(0), graph.Float(r.Float64()*2)))
	case 2:
		scaled := call("aten::mul.Scalar", graph.Ref(0), graph.Float(r.Float64()*2))
		g.Nodes = append(g.Nodes, scaled, node(graph.KindWrite, block, "0", graph.Ref(1)))
	case 3: // in a block of its own that goes before, as an edit does
		g.Invokes = append([]graph.Invoke{{Edit: true, NoGrad: g.Invokes[0].NoGrad}}, g.Invokes...)
		own := node(graph.KindRead, block, "0")
		own.Invoke = 1
		g.Nodes = append(g.Nodes, call("aten::add_.Scalar", graph.Ref(0), graph.Float(r.Float64())), own)
	}
	main, last := int32(len(g.Invokes)-1), graph.ID(len(g.Nodes))
	for i, n := range []graph.Node{node(graph.KindRead, "lm_head", ""), node(graph.KindSave, "", "", graph.Ref(last)),
		node(graph.KindSave, "", "", graph.Ref(0))} {
		if i < 2 || main == 0 {
			n.Invoke = main
			g.Nodes = append(g.Nodes, n)
		}
	}
	return g
}

// randomGeneration makes a request of a company: prompts, masks, a number of tokens and lines at a block, if one is named,
// by chance.
func randomGeneration(t *testing.T, r *rand.Rand, settings gen.Settings, block string) []byte {
	settings.MaxNewTokens = 1 + r.IntN(10)
	request := Request{Version: 1, Model: "m", Kind: Generate, Settings: &settings, Prompt: &Prompt{}}
	for range 1 + r.IntN(2) {
		row := make([]int64, 1+r.IntN(6))
		for i := range row {
			row[i] = 1 + r.Int64N(20)
		}
		request.Prompt.Rows = append(request.Prompt.Rows, row)
	}
	if r.IntN(3) == 0 {
		for _, row := range request.Prompt.Rows {
			mask := make([]int64, len(row))
			for i := range mask {
				mask[i] = min(1, int64(i+r.IntN(2)))
			}
			mask[len(mask)-1] = 1
			request.Prompt.Masks = append(request.Prompt.Masks, mask)
		}
	}
	programs := map[string][]byte{"g": graph.Encode(&graph.Graph{Invokes: []graph.Invoke{{}}})}
	speaks := block != "" && r.IntN(3) > 0
	for i := range settings.MaxNewTokens + r.IntN(2) {
		name := "g"
		if speaks && r.IntN(2) == 0 {
			name = fmt.Sprint("g", i)
			programs[name] = graph.Encode(lines(r, block))
		}
		request.Steps = append(request.Steps, Step{Program: []string{name}, End: true, Want: []string{WantResults, WantDrawn}})
	}
	if !settings.Sample {
		return wire(t, request, programs, nil)
	}
	request.Random = "random"
	random := anotherState(t, r)
	defer random.Free()
	return wire(t, request, programs, map[string]aten.Tensor{"random": random})
}

// anotherState is a state of a generator that nobody has had.
func anotherState(t *testing.T, r *rand.Rand) aten.Tensor {
	op, err := aten.Find("aten::rand")
	require.NoError(t, err)
	drawn, err := op.Call([]aten.Value{aten.IntsValue(1 + r.Int64N(100))})
	require.NoError(t, err)
	drawn.Free()
	state, err := aten.RandomState("cpu")
	require.NoError(t, err)
	return state
}

// leftIn is the state of the generator that a response has.
func leftIn(t *testing.T, data []byte) []byte {
	f, err := readFile(data)
	require.NoError(t, err)
	r, _ := response(t, data)
	return f[r.Random].Data
}

// parsed reads a request, and gives also what it comes to alone.
func parsed(t *testing.T, p *Performer, data []byte) (*Request, Response) {
	r, err := Parse(data, p.Limits)
	require.NoError(t, err)
	require.NotNil(t, r.Company())
	out, err := perform(t, p, data)
	require.NoError(t, err)
	want, _ := response(t, out)
	return r, want
}

// same requires responses of the same steps, whose values differ by rounding alone.
func same(t *testing.T, want, got []byte, about ...any) {
	head, values := response(t, want)
	gotHead, found := response(t, got)
	require.Equal(t, head.Steps, gotHead.Steps, about...)
	for i := range values {
		for k := range values[i] {
			require.Len(t, found[i][k], len(values[i][k]), about...)
			require.InDeltaSlice(t, values[i][k], found[i][k], 1e-4, about...)
		}
	}
}

// Requests that come at any step, and some that leave before they are done: each that stays has what it has alone.
func TestGenerationsJoinAndLeave(t *testing.T) {
	for name, config := range map[string]string{"gpt2": enginetest.GPT2, "llama": enginetest.Llama} {
		m, err := host.Open(enginetest.Directory(t, config, 1), host.Options{Prepack: -1})
		require.NoError(t, err)
		defer func() { require.NoError(t, m.Close()) }()
		p := &Performer{Model: m, Limits: Limits{Work: 1e12, Memory: 1 << 30}}
		for trial := range 28 {
			r := rand.New(rand.NewPCG(uint64(trial), 9))
			settings := likeSettings(r, trial)
			block := map[string]string{"gpt2": "transformer.h.1", "llama": "model.layers.1"}[name]
			wants, states := map[*Request][]byte{}, map[*Request][]byte{}
			a := p.Alongside()
			left, joined := 0, 0
			for step := 0; step == 0 || a.Open() > 0; step++ {
				if step < 12 && r.IntN(2) == 0 || step == 0 {
					var fresh []*Request
					for range 1 + r.IntN(3) {
						data := randomGeneration(t, r, settings, block)
						one, _ := parsed(t, p, data)
						alone, err := perform(t, p, data)
						require.NoError(t, err)
						wants[one], states[one] = alone, leftIn(t, alone)
						fresh = append(fresh, one)
					}
					require.NoError(t, a.Join(t.Context(), fresh))
					joined += len(fresh)
				}
				if a.Open() > 1 && r.IntN(8) == 0 {
					require.NoError(t, a.Leave(a.all[r.IntN(len(a.all))].request))
					left++
				}
				if a.Open() > 0 {
					require.NoError(t, a.Step(t.Context()))
				}
				for _, done := range a.Grown() {
					same(t, wants[done.Request], done.Response, "%s, trial %d, step %d", name, trial, step)
					require.Equal(t, states[done.Request], leftIn(t, done.Response))
					joined--
				}
			}
			require.Equal(t, left, joined, "%s, trial %d", name, trial)
		}
	}
}

// One that cannot join does not harm those that are under way.
func TestWhoCannotJoin(t *testing.T) {
	p := &Performer{Model: open(t)}
	r := rand.New(rand.NewPCG(1, 1))
	live := aten.Live()
	a := p.Alongside()
	settings := gen.Settings{Temperature: 1}
	var one *Request
	var want Response
	for one == nil || one.Settings.MaxNewTokens < 4 {
		one, want = parsed(t, p, randomGeneration(t, r, settings, ""))
	}
	require.NoError(t, a.Join(t.Context(), []*Request{one}))
	bad, err := Parse(randomGeneration(t, r, settings, ""), Limits{})
	require.NoError(t, err)
	bad.Prompt.Rows[0][0] = 1 << 40
	require.ErrorContains(t, a.Join(t.Context(), []*Request{bad}), "vocabulary")
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	good, err := Parse(randomGeneration(t, r, settings, ""), Limits{})
	require.NoError(t, err)
	require.Equal(t, fault.Cancelled, fault.As(a.Join(gone, []*Request{good})).Code)
	require.Equal(t, 1, a.Open())
	for a.Open() > 0 {
		require.NoError(t, a.Step(t.Context()))
	}
	got, _ := response(t, a.Grown()[0].Response)
	require.Equal(t, want, got)
	require.NoError(t, p.Model.Load())
	require.LessOrEqual(t, aten.Live()-live, int64(len(p.Model.Describe().Params)))
}

// A line that fails at a later step, or a constant that is not there: its request leaves, and the others do not notice.
func TestALineThatFailsBesideOthers(t *testing.T) {
	p := &Performer{Model: open(t)}
	r := rand.New(rand.NewPCG(3, 1))
	settings := gen.Settings{Temperature: 1}
	live := aten.Live()
	for _, breaks := range []func(g *graph.Graph){
		func(g *graph.Graph) {
			g.Nodes[1] = graph.Node{Kind: graph.KindCall, Op: "aten::select.int", Args: []graph.Arg{graph.Ref(0), graph.Int(1), graph.Int(9)}, Pos: -1}
		},
		func(g *graph.Graph) { g.Nodes[0].Path = "transformer.h.9" },
		func(g *graph.Graph) { g.Nodes[1] = graph.Node{Kind: graph.KindConst, Index: 3, Pos: -1} },
	} {
		var all []*Request
		var wants [][]byte
		for len(all) < 4 {
			data := randomGeneration(t, r, settings, "transformer.h.1")
			one, want := parsed(t, p, data)
			if one.Settings.MaxNewTokens < 5 || len(want.Steps) < 5 {
				continue
			}
			out, err := perform(t, p, data)
			require.NoError(t, err)
			all, wants = append(all, one), append(wants, out)
		}
		bad := lines(r, "transformer.h.1")
		for len(bad.Invokes) > 1 || len(bad.Nodes) < 5 {
			bad = lines(r, "transformer.h.1")
		}
		bad.Nodes[len(bad.Nodes)-1].Args = []graph.Arg{graph.Ref(1)} // so that it is wanted
		breaks(bad)
		all[2].programs[3] = program{graph: bad}
		require.NotNil(t, all[2].Company())
		a := p.Alongside()
		require.NoError(t, a.Join(t.Context(), all))
		var grew []Grown
		for step := 1; a.Open() > 0; step++ {
			require.NoError(t, a.Step(t.Context()))
			grew = append(grew, a.Grown()...)
			apart := a.Apart()
			require.Equal(t, step == 3, slices.Contains(apart, all[2]))
			require.Equal(t, step == 3, len(apart) == 1)
		}
		require.Len(t, grew, 3)
		for _, done := range grew {
			same(t, wants[slices.Index(all, done.Request)], done.Response)
		}
	}
	require.NoError(t, p.Model.Load())
	require.LessOrEqual(t, aten.Live()-live, int64(len(p.Model.Describe().Params)))
}

// What somebody's lines may do at a later step that fails without being a line's: whose it is leaves, and nobody else.
func TestStepsThatFailBesideOthers(t *testing.T) {
	p := &Performer{Model: open(t)}
	node := func(kind graph.Kind, path, leaf string, args ...graph.Arg) graph.Node {
		return graph.Node{Kind: kind, Path: path, Port: graph.PortOutput, Leaf: leaf, Args: args, Pos: -1}
	}
	call := func(op string, args ...graph.Arg) graph.Node {
		return graph.Node{Kind: graph.KindCall, Op: op, Args: args, Pos: -1}
	}
	read := node(graph.KindRead, "transformer.h.1", "0")
	head := node(graph.KindRead, "lm_head", "")
	save := node(graph.KindSave, "", "", graph.Ref(0))
	for what, c := range map[string]struct {
		apart  bool // it leaves, since it fails
		sample bool
		invoke graph.Invoke
		nodes  []graph.Node
	}{
		"masks of no rows": {invoke: graph.Invoke{Masks: [][]int64{}}, nodes: []graph.Node{read, save}},
		"hidden":           {apart: true, nodes: []graph.Node{node(graph.KindRead, "transformer.h.0.attn.heads.scores", ""), save}},
		"another rank": {apart: true, nodes: []graph.Node{read, call("aten::unsqueeze_", graph.Ref(0), graph.Int(0)),
			call("aten::unsqueeze_", graph.Ref(0), graph.Int(0)), node(graph.KindRead, "lm_head", ""), save, node(graph.KindSave, "", "", graph.Ref(3))}},
		"no probabilities": {apart: true, sample: true, nodes: []graph.Node{head, call("aten::mul_.Scalar", graph.Ref(0), graph.Float(math.NaN())), save}},
	} {
		t.Run(what, func(t *testing.T) {
			for at := range 4 {
				r := rand.New(rand.NewPCG(3, 1))
				settings := gen.Settings{Temperature: 1, Sample: c.sample}
				var all []*Request
				var wants [][]byte
				for len(all) < 4 {
					data := randomGeneration(t, r, settings, "transformer.h.1")
					one, want := parsed(t, p, data)
					if one.Settings.MaxNewTokens < 5 || len(want.Steps) < 5 {
						continue
					}
					out, err := perform(t, p, data)
					require.NoError(t, err)
					all, wants = append(all, one), append(wants, out)
				}
				bad := &graph.Graph{Invokes: []graph.Invoke{c.invoke}, Nodes: c.nodes}
				all[at].programs[3] = program{graph: bad}
				require.NotNil(t, all[at].Company())
				a := p.Alongside()
				require.NoError(t, a.Join(t.Context(), all))
				var grew []Grown
				var apart []*Request
				for a.Open() > 0 {
					require.NoError(t, a.Step(t.Context()))
					grew, apart = append(grew, a.Grown()...), append(apart, a.Apart()...)
				}
				if c.apart {
					require.Equal(t, []*Request{all[at]}, apart)
				} else {
					require.Empty(t, apart)
				}
				for _, done := range grew {
					if done.Request != all[at] {
						same(t, wants[slices.Index(all, done.Request)], done.Response)
					}
				}
			}
		})
	}
}

// Lines that name what rows of others give another shape, or what is there because of them alone: they are not done beside
// those.
func TestLinesThatWouldSeeThePaddingOfOthers(t *testing.T) {
	p := &Performer{Model: open(t)}
	request := func(at *graph.Graph, rows ...[]int64) *Request {
		settings := gen.Settings{MaxNewTokens: 5, Temperature: 1}
		r := Request{Version: 1, Model: "m", Kind: Generate, Settings: &settings, Prompt: &Prompt{Rows: rows}}
		for range settings.MaxNewTokens {
			r.Steps = append(r.Steps, Step{Program: []string{"g"}, End: true, Want: []string{WantResults, WantDrawn}})
		}
		r.Steps[3].Program = []string{"at"}
		out, err := Parse(wire(t, r, map[string][]byte{"g": graph.Encode(&graph.Graph{Invokes: []graph.Invoke{{}}}), "at": graph.Encode(at)}, nil), Limits{})
		require.NoError(t, err)
		return out
	}
	save := graph.Node{Kind: graph.KindSave, Args: []graph.Arg{graph.Ref(0)}, Pos: -1}
	for what, node := range map[string]graph.Node{
		"mask":      {Kind: graph.KindRead, Path: "transformer.h.0", Port: graph.PortInput, Leaf: "args.2", Pos: -1},
		"positions": {Kind: graph.KindRead, Path: "transformer.wpe", Port: graph.PortOutput, Pos: -1},
		"call":      {Kind: graph.KindModule, Path: "transformer.wpe", Args: []graph.Arg{graph.Ref(0)}, Pos: -1},
	} {
		nodes := []graph.Node{node, save}
		if node.Kind == graph.KindModule {
			ids := graph.Node{Kind: graph.KindRead, Path: "transformer.wte", Port: graph.PortInput, Leaf: "args.0", Pos: -1}
			last := save
			last.Args = []graph.Arg{graph.Ref(1)}
			nodes = []graph.Node{ids, node, last}
		}
		rows := [][]int64{{1, 2, 3}, {4, 5}}
		if what != "mask" {
			rows[1] = []int64{4, 5, 6}
		}
		one := request(&graph.Graph{Invokes: []graph.Invoke{{}}, Nodes: nodes}, rows...)
		want, err := p.Perform(t.Context(), "somebody", one)
		require.NoError(t, err, what)
		a := p.Alongside()
		require.NoError(t, a.Join(t.Context(), []*Request{request(&graph.Graph{Invokes: []graph.Invoke{{}}}, []int64{1, 2, 3, 4, 5, 6, 7}), one}))
		var grew []Grown
		var apart []*Request
		for a.Open() > 0 {
			require.NoError(t, a.Step(t.Context()), what)
			grew, apart = append(grew, a.Grown()...), append(apart, a.Apart()...)
		}
		for _, done := range grew {
			if done.Request == one {
				f, _ := readFile(want)
				g, _ := readFile(done.Response)
				require.Equal(t, f, g, what)
			}
		}
		require.Equal(t, []*Request{one}, apart, what)
	}
}

// More bytes than an estimate knew of: whose they are leaves, and the others go on.
func TestOneThatGivesTooMuchBesideOthers(t *testing.T) {
	p := &Performer{Model: open(t), Limits: Limits{Output: 1 << 20}}
	r := rand.New(rand.NewPCG(8, 1))
	var all []*Request
	var wants [][]byte
	for len(all) < 3 {
		data := randomGeneration(t, r, gen.Settings{Temperature: 1}, "transformer.h.1")
		if one, want := parsed(t, p, data); one.hasLines() && len(want.Steps) > 5 && len(one.programs[3].graph.Nodes) > 0 {
			out, err := perform(t, p, data)
			require.NoError(t, err)
			all, wants = append(all, one), append(wants, out)
		}
	}
	a := p.Alongside()
	defer a.Free()
	require.NoError(t, a.Join(t.Context(), all))
	for _, g := range a.all {
		if g.request == all[1] {
			g.bytes = 1 << 20
		}
	}
	grew, apart := a.Grown(), a.Apart()
	for a.Open() > 0 {
		require.NoError(t, a.Step(t.Context()))
		grew, apart = append(grew, a.Grown()...), append(apart, a.Apart()...)
	}
	require.Equal(t, []*Request{all[1]}, apart)
	require.Len(t, grew, 2)
	for _, done := range grew {
		same(t, wants[slices.Index(all, done.Request)], done.Response)
	}
	bad, err := Parse(randomGeneration(t, r, gen.Settings{Temperature: 1}, ""), Limits{})
	require.NoError(t, err)
	require.NoError(t, a.begin(t.Context(), []*Request{bad}))
	a.all[0].bytes = 1 << 21
	a.all[0].request.Steps[0].Want = []string{WantDrawn}
	require.NoError(t, a.Step(t.Context()), "tokens alone are no values")
}

func TestGenerationsThatShareSteps(t *testing.T) {
	m := open(t)
	p := &Performer{Model: m}
	r := rand.New(rand.NewPCG(5, 6))
	for trial := range 20 {
		settings := likeSettings(r, trial)
		var all []*Request
		var alone []Response
		for range 2 + r.IntN(4) {
			one, want := parsed(t, p, randomGeneration(t, r, settings, ""))
			require.Equal(t, one.Company(), first(append(all, one)).Company())
			all, alone = append(all, one), append(alone, want)
		}
		together, err := p.PerformTogether(t.Context(), all)
		require.NoError(t, err)
		for i := range all {
			got, _ := response(t, together[i])
			require.Equal(t, alone[i].Steps, got.Steps, "trial %d, request %d", trial, i)
		}
	}
	// those that run alone
	one := generation(t, 6, "", false)
	one.Steps[5].Want = []string{WantDrawn}
	for name, change := range map[string]func(r *Request){
		"a state nobody draws from": func(r *Request) { r.Random = "random" },
		"a state of a step": func(r *Request) {
			r.Settings.Sample, r.Random, r.Steps[3].Random = true, "random", "random"
		},
		"beams":                   func(r *Request) { r.Settings.Beams = 2 },
		"not to their end":        func(r *Request) { r.Steps = r.Steps[:5] },
		"scores":                  func(r *Request) { r.Steps[5].Want = []string{WantScores} },
		"ended":                   func(r *Request) { r.Steps[5].Ended = []bool{true} },
		"several of each":         func(r *Request) { r.Settings.Returned = 2 },
		"a step that has no end":  func(r *Request) { r.Steps[5].End = false },
		"more new ones than said": func(r *Request) { r.Settings.MaxNewTokens = 7 },
		"no rows":                 func(r *Request) { r.Prompt = &Prompt{} },
		"masks of other rows":     func(r *Request) { r.Prompt = &Prompt{Rows: r.Prompt.Rows, Masks: [][]int64{}} },
	} {
		request := one
		settings := *one.Settings
		request.Settings, request.Steps = &settings, append([]Step(nil), one.Steps...)
		change(&request)
		request.programs = make([]program, len(request.Steps))
		for i := range request.programs {
			request.programs[i].graph = &graph.Graph{}
		}
		require.Nil(t, request.Company(), name)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	file, err := Parse(wire(t, one, nil, nil), Limits{})
	require.NoError(t, err)
	_, err = p.PerformTogether(ctx, []*Request{file, file})
	require.Equal(t, fault.Cancelled, fault.As(err).Code)
}

func first(all []*Request) *Request { return all[0] }
