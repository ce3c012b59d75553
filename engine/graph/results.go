package graph

import "github.com/tinylib/msgp/msgp"

// Result is one saved value: a tree whose references number the tensors that travel beside it.
type Result struct {
	Node  ID  // the save node it comes from
	Value Arg // its references are numbers of tensors, not of nodes
}

// EncodeResults writes saved values in wire form.
func EncodeResults(results []Result) []byte {
	b := msgp.AppendArrayHeader(nil, uint32(len(results)))
	for i := range results {
		b = msgp.AppendArrayHeader(b, 2)
		b = msgp.AppendInt32(b, int32(results[i].Node))
		b = appendArg(b, &results[i].Value)
	}
	return b
}

// DecodeResults reads saved values in wire form; ntensors is how many tensors travel beside them.
// The bytes may come from anyone: what is wrong with them is an error of code Graph.
func DecodeResults(data []byte, ntensors int) ([]Result, error) {
	d := decoder{what: "result", rest: data, node: NoID, refs: int64(ntensors)}
	n := d.list("results", MaxNodes, 3)
	out := make([]Result, 0, n)
	for i := 0; i < n && d.err == nil; i++ {
		d.parts("a result", 2)
		r := Result{Node: ID(d.small("a node", 0, MaxNodes-1))}
		if d.room(1) {
			r.Value = d.arg(0)
		}
		out = append(out, r)
	}
	if err := d.end(); err != nil {
		return nil, err
	}
	return out, nil
}
