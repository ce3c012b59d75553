package graph_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/stretchr/testify/require"
	"github.com/tinylib/msgp/msgp"
)

func TestRoundTrip(t *testing.T) {
	r := &maker{Rand: rand.New(rand.NewPCG(1, 2))}
	for range 2000 {
		g := r.graph(r.IntN(12))
		data := graph.Encode(g)
		back, err := graph.Decode(data)
		require.NoError(t, err)
		require.Equal(t, g, back)
		require.Equal(t, data, graph.Encode(back))
	}
}

func TestRoundTripOfOddNumbers(t *testing.T) {
	for _, f := range []float64{math.NaN(), math.Inf(1), math.Inf(-1), math.Copysign(0, -1), math.SmallestNonzeroFloat64, math.MaxFloat64} {
		for _, a := range []graph.Arg{graph.Float(f), {Kind: graph.ArgComplex, F: f, G: -f}} {
			back, err := graph.DecodeResults(graph.EncodeResults([]graph.Result{{Value: a}}), 0)
			require.NoError(t, err)
			require.Equal(t, math.Float64bits(a.F), math.Float64bits(back[0].Value.F))
			require.Equal(t, math.Float64bits(a.G), math.Float64bits(back[0].Value.G))
		}
	}
	for _, i := range []int64{0, -1, 127, 128, -32, -33, 255, 256, 1 << 31, 1 << 32, math.MaxInt64, math.MinInt64} {
		back, err := graph.DecodeResults(graph.EncodeResults([]graph.Result{{Value: graph.Int(i)}}), 0)
		require.NoError(t, err)
		require.Equal(t, i, back[0].Value.I)
	}
}

func TestResults(t *testing.T) {
	results := []graph.Result{
		{Node: 4, Value: graph.Ref(0)},
		{Node: 9, Value: graph.List(graph.Ref(1), graph.Arg{Kind: graph.ArgDict, S: "Output", Keys: []string{"logits"}, L: []graph.Arg{graph.Ref(0)}})},
	}
	data := graph.EncodeResults(results)
	back, err := graph.DecodeResults(data, 2)
	require.NoError(t, err)
	require.Equal(t, results, back)
	_, err = graph.DecodeResults(data, 1)
	require.ErrorContains(t, err, "the result cannot be read: it speaks of tensor 1 of 1")
	for cut := range data {
		_, err := graph.DecodeResults(data[:cut], 2)
		require.Equal(t, fault.Graph, fault.As(err).Code, "cut at %d", cut)
	}
}

// pack encodes plain Go values as MessagePack: a list is []any, a map kv.
type kv []any

func pack(b []byte, x any) []byte {
	switch x := x.(type) {
	case []any:
		b = msgp.AppendArrayHeader(b, uint32(len(x)))
		for _, item := range x {
			b = pack(b, item)
		}
		return b
	case kv:
		b = msgp.AppendMapHeader(b, uint32(len(x)/2))
		for _, item := range x {
			b = pack(b, item)
		}
		return b
	}
	b, err := msgp.AppendIntf(b, x)
	if err != nil {
		panic(err)
	}
	return b
}

type list = []any

// program packs a graph of one invoke whose nodes are given.
func program(nodes ...any) []byte {
	return pack(nil, list{1, list{list{list{list{1, 2}}, nil}}, list(nodes), list{}})
}

func TestDecodeRefuses(t *testing.T) {
	read := list{4, 0, -1, 1, "h.0", 1, 0, ""}
	save := func(arg any) []byte { return program(read, list{8, 0, -1, 1, arg}) }
	call := func(rest ...any) []byte { return program(read, append(list{0, 0, -1, 1}, rest...)) }
	deep := func(n int) any {
		x := any(list{1})
		for range n - 1 {
			x = list{1, x}
		}
		return x
	}
	_, err := graph.Decode(save(deep(graph.MaxNesting)))
	require.NoError(t, err)
	for name, c := range map[string]struct {
		data []byte
		node int
		says string
	}{
		"nothing":            {nil, -1, "ends in the middle of the list of parts of the graph"},
		"no list":            {pack(nil, "graph"), -1, "something else stands where the list of parts of the graph should be"},
		"too few parts":      {pack(nil, list{1}), -1, "the graph has 1 parts instead of 4"},
		"other version":      {pack(nil, list{2, list{}, list{}, list{}}), -1, "version 2; this engine reads version 1"},
		"more behind":        {append(program(read), 0), -1, "1 bytes follow its end"},
		"unknown kind":       {program(list{14, 0, -1, 1, nil}), 0, "its kind is 14"},
		"a model's kind":     {program(list{15, 0, -1, 1, "input_ids"}), 0, "its kind is 15"},
		"huge kind":          {program(list{1 << 20, 0, -1, 1, nil}), 0, "its kind is 1048576"},
		"negative kind":      {program(list{-1, 0, -1, 1, nil}), 0, "its kind is -1"},
		"invoke":             {program(list{8, 1, -1, 1, nil}), 0, "its invoke is 1, which is not between 0 and 0"},
		"no invoke":          {pack(nil, list{1, list{}, list{list{8, 0, -1, 1, nil}}, list{}}), 0, "there is none"},
		"position":           {program(read, list{8, 0, 0, 1, nil}), 1, "its line is position 0 of 0"},
		"mode":               {program(list{8, 0, -1, 4, nil}), 0, "its mode is 4"},
		"short node":         {program(read, list{8, 0}), 1, "it has 2 parts"},
		"missing part":       {program(read, list{8, 0, -1, 1}), 1, "a node of kind save has 4 parts instead of 5"},
		"part too many":      {program(read, list{8, 0, -1, 1, nil, nil}), 1, "a node of kind save has 6 parts instead of 5"},
		"port":               {program(list{4, 0, -1, 1, "h.0", 3, 0, ""}), 0, "a port is 3"},
		"step":               {program(list{4, 0, -1, 1, "h.0", 1, -1, ""}), 0, "a step is -1"},
		"path":               {program(list{4, 0, -1, 1, 7, 1, 0, ""}), 0, "something else stands where a module's path should be"},
		"not UTF-8":          {program(list{4, 0, -1, 1, "h\xff", 1, 0, ""}), 0, "a module's path is not UTF-8"},
		"constant":           {program(list{7, 0, -1, 1, -1}), 0, "the number of a constant is -1"},
		"self":               {save(list{0, 1}), 1, "it uses value 1, which does not come before it"},
		"forward":            {save(list{1, list{0, 7}}), 1, "it uses value 7"},
		"below zero":         {save(list{0, -1}), 1, "it uses value -1"},
		"far below zero":     {save(list{0, int64(math.MinInt64)}), 1, "it uses value -9223372036854775808"},
		"reference wraps":    {save(list{0, int64(1) << 32}), 1, "it uses value 4294967296"},
		"no tag":             {save(list{}), 1, "a list without a tag"},
		"unknown tag":        {save(list{12}), 1, "a tag is 12"},
		"tag is text":        {save(list{"ref"}), 1, "where a tag should be"},
		"reference of two":   {save(list{0, 0, 0}), 1, "tag 0 has 3 parts instead of 2"},
		"slice of two":       {save(list{4, nil, nil}), 1, "tag 4 has 3 parts instead of 4"},
		"ellipsis with more": {save(list{5, 1}), 1, "tag 5 has 2 parts"},
		"dtype without name": {save(list{6}), 1, "tag 6 has 1 parts"},
		"complex of ints":    {save(list{1, list{10, 1, 2}, 1.5}), 1, "where a float should be"},
		"odd dictionary":     {save(list{3, "a"}), 1, "a key without a value"},
		"same key twice":     {save(list{3, "a", 1, "a", 2}), 1, `the name "a" is there twice`},
		"key is a number":    {save(list{3, 1, 1}), 1, "where a key should be"},
		"object of no class": {save(list{11, "", "a", 1}), 1, "has no name"},
		"object alone":       {save(list{11}), 1, "an object has no class"},
		"too deep":           {save(deep(graph.MaxNesting + 1)), 1, "nested more than 64 deep"},
		"bytes":              {save([]byte("x")), 1, "cannot be a MessagePack bin"},
		"map":                {save(kv{"a", 1}), 1, "cannot be a MessagePack map"},
		"huge number":        {save(uint64(math.MaxUint64)), 1, "does not fit 64 bits"},
		"keyword twice":      {call("aten::add", list{}, kv{"x", 1, "x", 2}), 1, `the name "x" is there twice`},
		"keywords in a list": {call("aten::add", list{}, list{"x", 1}), 1, "where the named arguments should be"},
		"arguments in a map": {call("aten::add", kv{}, nil), 1, "where the list of arguments should be"},
		"long string":        {call(strings.Repeat("x", graph.MaxString+1), list{}, nil), 1, "a string of 1048577 bytes"},
		"rows and masks":     {pack(nil, list{1, list{list{list{list{1}}, list{}}}, list{}, list{}}), -1, "1 rows and 0 masks"},
		"tokens":             {pack(nil, list{1, list{list{list{list{"a"}}, nil}}, list{}, list{}}), -1, "where a token should be"},
		"line":               {pack(nil, list{1, list{}, list{}, list{list{"f", -1, ""}}}), -1, "a line is -1"},
		"place of two":       {pack(nil, list{1, list{}, list{}, list{list{"f", 1}}}), -1, "a position has 2 parts instead of 3"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := graph.Decode(c.data)
			var e *fault.Error
			require.True(t, errors.As(err, &e), "%v", err)
			require.Equal(t, fault.Graph, e.Code)
			require.Contains(t, e.Message, c.says)
			require.Equal(t, c.node, e.Node)
		})
	}
}

// TestDecodeLimits packs lists just longer than what is allowed, of the smallest elements there are.
func TestDecodeLimits(t *testing.T) {
	many := func(n int, item string) []byte {
		return append(msgp.AppendArrayHeader(nil, uint32(n)), strings.Repeat(item, n)...)
	}
	join := func(parts ...[]byte) (out []byte) {
		for _, p := range parts {
			out = append(out, p...)
		}
		return out
	}
	head := []byte{0x94, 1}
	none := []byte{0x90}
	oneInvoke := pack(nil, list{list{nil, nil}})
	call := func(args []byte) []byte {
		return join([]byte{0x97, 0, 0, 0xff, 1}, msgp.AppendString(nil, "aten::cat"), args, []byte{0xc0})
	}
	half := call(many(graph.MaxArgs/2+1, "\xc0"))
	for name, c := range map[string]struct {
		data []byte
		says string
	}{
		"invokes":   {join(head, many(graph.MaxInvokes+1, "\x92\xc0\xc0"), none, none), "65537 invokes"},
		"nodes":     {join(head, oneInvoke, many(graph.MaxNodes+1, "\x95\x08\x00\xff\x01\xc0"), none), "1048577 nodes"},
		"positions": {join(head, none, none, many(graph.MaxPositions+1, "\x93\xa0\x00\xa0")), "1048577 positions"},
		"tokens":    {join(head, []byte{0x91, 0x92, 0x91}, many(graph.MaxTokens, "\x00"), []byte{0xc0}, none, none), "more than 16777216 tokens"},
		"rows":      {join(head, []byte{0x91, 0x92}, many(graph.MaxTokens/2+1, "\x90"), many(graph.MaxTokens/2+1, "\x90"), none, none), "more than 16777216 tokens"},
		"arguments": {join(head, oneInvoke, []byte{0x92}, half, half, none), "more than 2097152 arguments"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := graph.Decode(c.data)
			require.ErrorContains(t, err, c.says)
		})
	}
}

// TestDecodeTrustsNoLength gives lists lengths that no bytes follow: hardly any memory may be taken.
func TestDecodeTrustsNoLength(t *testing.T) {
	huge := "\xdd\xff\xff\xff\xff"
	node := "\x94\x01\x91\x92\xc0\xc0\x91"
	for name, data := range map[string]string{
		"parts":     huge,
		"invokes":   "\x94\x01" + huge,
		"nodes":     "\x94\x01\x90\xdd\x00\x10\x00\x00",
		"rows":      "\x94\x01\x91\x92\xdd\x00\xff\xff\xff",
		"tokens":    "\x94\x01\x91\x92\x91\xdd\x00\xff\xff\xff",
		"positions": "\x94\x01\x90\x90\xdd\x00\x0f\xff\xff",
		"node":      node + huge,
		"arguments": node + "\x97\x00\x00\xff\x01\xa1x\xdd\x00\x1f\xff\xff",
		"keywords":  node + "\x97\x00\x00\xff\x01\xa1x\x90\xdf\x00\x0f\xff\xff",
		"argument":  node + "\x95\x08\x00\xff\x01\xdd\x00\x1f\xff\xff\x01",
		"string":    node + "\x95\x08\x00\xff\x01\xdb\xff\xff\xff\xff",
	} {
		t.Run(name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, err := graph.Decode([]byte(data))
			runtime.ReadMemStats(&after)
			require.Error(t, err)
			require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(1<<16))
		})
	}
}

func TestDecodeTruncated(t *testing.T) {
	data := graph.Encode(trace())
	for cut := range data {
		_, err := graph.Decode(data[:cut])
		require.Error(t, err, "cut at %d", cut)
		require.Equal(t, fault.Graph, fault.As(err).Code)
	}
}

func TestEncodeRefusesModels(t *testing.T) {
	require.PanicsWithValue(t, "graph: a node of kind mark has no wire form", func() {
		graph.Encode(&graph.Graph{Nodes: []graph.Node{{Kind: graph.KindMark}}})
	})
}

// TestPython decodes what tests/test_wire.py encoded, a graph with every kind of node and argument.
func TestPython(t *testing.T) {
	data, err := os.ReadFile(filepath.Join("testdata", "python.msgpack"))
	require.NoError(t, err)
	g, err := graph.Decode(data)
	require.NoError(t, err)
	golden(t, "python.txt", g.String())
	require.Equal(t, []graph.Invoke{
		{Rows: [][]int64{{464, 412, 0}}},
		{Rows: [][]int64{{1, 2}, {300, 70000, 3}}, Masks: [][]int64{{0, 1}, {1, 1, 1}}},
		{},
	}, g.Invokes)
	kinds, args := map[graph.Kind]bool{}, map[graph.ArgKind]bool{}
	var walk func(a *graph.Arg)
	walk = func(a *graph.Arg) {
		args[a.Kind] = true
		for i := range a.L {
			walk(&a.L[i])
		}
	}
	for i := range g.Nodes {
		kinds[g.Nodes[i].Kind] = true
		for k := range g.Nodes[i].Args {
			walk(&g.Nodes[i].Args[k])
		}
	}
	require.Len(t, kinds, int(graph.KindParam), "every kind is there")
	require.Len(t, args, int(graph.ArgComplex)+1, "every kind of argument is there")
	back, err := graph.Decode(graph.Encode(g))
	require.NoError(t, err)
	require.Equal(t, g, back)
}

// TestForPython holds the bytes that tests/test_wire.py decodes.
func TestForPython(t *testing.T) {
	golden(t, "go.msgpack", string(graph.Encode(trace())))
	golden(t, "results.msgpack", string(graph.EncodeResults([]graph.Result{
		{Node: 5, Value: graph.List(graph.Ref(0), graph.Arg{Kind: graph.ArgDict, Keys: []string{"y"}, L: []graph.Arg{graph.Ref(1)}})},
		{Node: 300, Value: graph.Tuple(graph.Int(-70000), graph.Float(0.5), graph.Null(), graph.Bool(true), graph.String("é"))},
	})))
}

func FuzzDecode(f *testing.F) {
	for _, file := range []string{"python.msgpack", "go.msgpack", "results.msgpack"} {
		data, err := os.ReadFile(filepath.Join("testdata", file))
		require.NoError(f, err)
		f.Add(data)
	}
	r := &maker{Rand: rand.New(rand.NewPCG(3, 4))}
	for range 8 {
		f.Add(graph.Encode(r.graph(6)))
	}
	m := model()
	f.Fuzz(func(t *testing.T, data []byte) {
		if results, err := graph.DecodeResults(data, 4); err == nil {
			again, err := graph.DecodeResults(graph.EncodeResults(results), 4)
			require.NoError(t, err)
			require.Equal(t, graph.EncodeResults(results), graph.EncodeResults(again))
		}
		g, err := graph.Decode(data)
		if err != nil {
			require.Equal(t, fault.Graph, fault.As(err).Code)
			return
		}
		text := graph.Encode(g)
		back, err := graph.Decode(text)
		require.NoError(t, err)
		require.Equal(t, text, graph.Encode(back), "bytes, as NaN differs from itself")
		lines := strings.Count(g.String(), "\n")
		require.GreaterOrEqual(t, lines, 1+len(g.Nodes))
		require.NotContains(t, g.Mermaid(), "%%")
		if err := graph.Verify(g, m, 4); err != nil {
			require.NotEqual(t, fault.Internal, fault.As(err).Code)
		}
	})
}

// thousand is a trace of 1,000 nodes of the kinds that traces mostly have.
func thousand() *graph.Graph {
	g := &graph.Graph{Invokes: []graph.Invoke{{Rows: [][]int64{{1, 2, 3}}}}, Positions: []fault.Pos{{File: "demo.py", Line: 1}}}
	for i := range 250 {
		at := graph.ID(4 * i)
		g.Nodes = append(g.Nodes,
			graph.Node{Kind: graph.KindRead, Path: "transformer.h.5.mlp", Port: graph.PortOutput, Leaf: "0"},
			graph.Node{Kind: graph.KindIndex, Args: []graph.Arg{graph.Ref(at), graph.Tuple(graph.Arg{Kind: graph.ArgEllipsis}, graph.Int(3))}},
			graph.Node{Kind: graph.KindCall, Op: "aten::add", Args: []graph.Arg{graph.Ref(at), graph.Ref(at + 1)}},
			graph.Node{Kind: graph.KindSave, Args: []graph.Arg{graph.Ref(at + 2)}})
	}
	return g
}

func BenchmarkDecode(b *testing.B) {
	data := graph.Encode(thousand())
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := graph.Decode(data); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEncode(b *testing.B) {
	g := thousand()
	b.ReportAllocs()
	for b.Loop() {
		graph.Encode(g)
	}
}

// TestDocumentation holds the example of docs/wire.md: its JSON, its bytes and its print are one graph.
func TestDocumentation(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "wire.md"))
	require.NoError(t, err)
	block := func(after, fence string) string {
		_, rest, ok := strings.Cut(string(text), after)
		require.True(t, ok, after)
		_, rest, ok = strings.Cut(rest, fence+"\n")
		require.True(t, ok, after)
		body, _, _ := strings.Cut(rest, "```")
		return body
	}
	data, err := hex.DecodeString(strings.Join(strings.Fields(block("in bytes,", "```")), ""))
	require.NoError(t, err)
	g, err := graph.Decode(data)
	require.NoError(t, err)
	require.Equal(t, block("and printed", "```"), g.String())
	var asJSON bytes.Buffer
	_, err = msgp.CopyToJSON(&asJSON, bytes.NewReader(data))
	require.NoError(t, err)
	require.JSONEq(t, block("written as JSON,", "```json"), asJSON.String())
}
