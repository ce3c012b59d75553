package remote

import (
	"context"
	"encoding/json"
	"slices"

	"github.com/nnsight-go/nnsight-go/engine/aten"
	"github.com/nnsight-go/nnsight-go/engine/fault"
	"github.com/nnsight-go/nnsight-go/engine/gen"
	"github.com/nnsight-go/nnsight-go/engine/graph"
	"github.com/nnsight-go/nnsight-go/engine/host"
	"github.com/nnsight-go/nnsight-go/engine/plan"
)

// alongside is the company of generations: all that decides about a token but how many there are.
type alongside struct{ settings string }

// company is that of a generation to whose end a request goes: its rows grow as they do alone, beside whatever others, and
// what they draw comes from the request's own generator.
func (r *Request) company() any {
	s := *r.Settings
	rows := len(r.Prompt.Rows)
	if rows == 0 || r.Prompt.Masks != nil && len(r.Prompt.Masks) != rows {
		return nil // an error of its own
	}
	if s.Beams > 1 || s.Returned > 1 || s.Sample != (r.Random != "") || len(r.Steps) < s.MaxNewTokens || s.MaxNewTokens < 1 {
		return nil
	}
	for i := range r.Steps {
		step := &r.Steps[i]
		if !step.End || step.Scores != "" || step.Ended != nil || step.Random != "" || !r.mayShare(i) {
			return nil
		}
		for _, want := range step.Want {
			if want != WantResults && want != WantDrawn {
				return nil
			}
		}
	}
	s.MaxNewTokens = 0
	text, err := json.Marshal(s)
	if err != nil {
		return nil
	}
	return alongside{string(text)}
}

// mayShare reports whether a step has no lines, or such as are done beside those of others.
func (r *Request) mayShare(step int) bool {
	g := r.programs[step].graph
	if len(g.Nodes) == 0 {
		return true
	}
	if !r.keepsToItself(step) || slices.ContainsFunc(g.Nodes, func(n graph.Node) bool { return plan.Draws(&n) }) {
		return false
	}
	// rows are the batch's, and lines of one invoke are all there are
	mains := 0
	for i := range g.Invokes {
		v := &g.Invokes[i]
		if v.Rows != nil || v.Inference || !v.Edit && i != len(g.Invokes)-1 {
			return false
		}
		if !v.Edit {
			mains++
		}
	}
	return mains == 1
}

// hasLines reports whether a generation does more than to write.
func (r *Request) hasLines() bool {
	return slices.ContainsFunc(r.programs, func(p program) bool { return len(p.graph.Nodes) > 0 })
}

// grown is a generation among others.
type grown struct {
	*performing
	rows int // those of it in the batch
	step int // that comes next

	draws *gen.Draws // its generator, where it draws
}

// Alongside is generations of one company that grow in the same steps, with what their lines do there. Requests join
// between two steps, and leave when they are done or nobody wants them any more, or when a line of theirs cannot be done
// beside others. It belongs to one goroutine at a time; free it.
type Alongside struct {
	performer *Performer
	batch     *gen.Generation // nil while there is nobody
	all       []*grown        // in the order of their rows
	grew      []Grown
	apart     []*Request
	why       error // the last of them is apart
}

// Grown is a request that is done, and its response.
type Grown struct {
	Request  *Request
	Response []byte
}

// Alongside is one without anybody. All that join keep to the performer's limits.
func (p *Performer) Alongside() *Alongside { return &Alongside{performer: p} }

// Open is how many requests are under way.
func (a *Alongside) Open() int { return len(a.all) }

// Rows is how many rows they have together.
func (a *Alongside) Rows() (n int) {
	for _, g := range a.all {
		n += g.rows
	}
	return n
}

// Grown gives those that are done since it was asked last.
func (a *Alongside) Grown() []Grown {
	out := a.grew
	a.grew = nil
	return out
}

// Apart gives those that have left since it was asked last, since they must run alone: something of theirs failed here.
func (a *Alongside) Apart() []*Request {
	out := a.apart
	a.apart = nil
	return out
}

// Free ends all that are under way.
func (a *Alongside) Free() {
	if a.batch != nil {
		a.batch.Free()
	}
	a.batch, a.all = nil, nil
}

// Join does the first step of requests, and lets them go on beside those that are under way. Where it fails none of them
// has joined, and the others go on.
func (a *Alongside) Join(ctx context.Context, requests []*Request) error {
	own := a.performer.Alongside()
	defer own.Free()
	for _, group := range firstSteps(requests) {
		if err := own.join(ctx, group); err != nil {
			return err
		}
	}
	return a.takeOver(own)
}

// firstSteps divides requests into those that do their first step together. Lines may look at all tokens of a prompt, so
// that those that have some do it without padding: beside prompts of the same length.
func firstSteps(requests []*Request) (groups [][]*Request) {
	numbers := map[int]int{} // by length: which of the groups
	for _, r := range requests {
		length := 0 // of those without lines
		if r.hasLines() {
			length = r.evenLength()
		}
		number, known := numbers[length]
		if !known {
			number = len(groups)
			groups = append(groups, nil)
			if length >= 0 {
				numbers[length] = number
			}
		}
		groups[number] = append(groups[number], r)
	}
	return groups
}

// evenLength is how many tokens each row of a prompt has, and counts; -1 where they differ.
func (r *Request) evenLength() int {
	first := len(r.Prompt.Rows[0])
	if r.Prompt.Masks != nil || slices.ContainsFunc(r.Prompt.Rows, func(row []int64) bool { return len(row) != first }) {
		return -1
	}
	return first
}

// join does the first step of requests together, and adds them.
func (a *Alongside) join(ctx context.Context, requests []*Request) error {
	own := a.performer.Alongside()
	defer own.Free()
	if err := own.begin(ctx, requests); err != nil {
		return err
	}
	if _, err := own.tried(ctx); err != nil {
		return err
	}
	if len(own.apart) > 0 {
		return own.why
	}
	return a.takeOver(own)
}

// takeOver adds the members of another, which has none then. Where it fails both are as they were.
func (a *Alongside) takeOver(o *Alongside) error {
	if o.batch != nil && a.batch != nil {
		if err := a.batch.Join(o.batch); err != nil {
			return err
		}
	} else if a.batch == nil {
		a.batch = o.batch
	}
	a.all, a.grew = append(a.all, o.all...), append(a.grew, o.grew...)
	o.batch, o.all, o.grew = nil, nil, nil
	return nil
}

// begin makes a batch of requests, padded on the left to be equally long.
func (a *Alongside) begin(ctx context.Context, requests []*Request) (err error) {
	settings := *requests[0].Settings
	var rows, masks [][]int64
	masked, longest := false, 0
	for _, r := range requests {
		g := &grown{performing: a.performer.begin(ctx, r), rows: len(r.Prompt.Rows)}
		if err := g.affordable(0); err != nil {
			return err
		}
		a.all = append(a.all, g)
		settings.MaxNewTokens = max(settings.MaxNewTokens, r.Settings.MaxNewTokens)
		rows = append(rows, r.Prompt.Rows...)
		for i, row := range r.Prompt.Rows {
			longest = max(longest, len(row))
			if r.Prompt.Masks != nil {
				masked = true
				masks = append(masks, r.Prompt.Masks[i])
				continue
			}
			masks = append(masks, slices.Repeat([]int64{1}, len(row)))
		}
	}
	if !masked {
		masks = nil
	}
	if a.batch, err = gen.New(a.performer.Model, rows, masks, settings); err != nil {
		return err
	}
	if settings.Sample {
		if err := a.giveGenerators(); err != nil {
			return err
		}
	}
	row := 0
	for _, r := range requests { // the padding of a request's own rows stays
		own := 0
		for _, prompt := range r.Prompt.Rows {
			own = max(own, len(prompt))
		}
		for range r.Prompt.Rows {
			a.batch.Unpadded(row, longest-own)
			row++
		}
	}
	return nil
}

// giveGenerators gives each request's rows the generator whose state it has sent.
func (a *Alongside) giveGenerators() error {
	for _, g := range a.all {
		state, err := g.request.file.tensor(g.request.Random)
		if err != nil {
			return err
		}
		g.draws = a.batch.DrawFrom(g.rows, state)
	}
	return nil
}

// drawn draws the tokens of a step that has run, with the process's generator put back behind it where rows draw from
// theirs.
func (a *Alongside) drawn() ([]int64, error) {
	if a.all[0].draws == nil {
		return a.batch.Next()
	}
	generator.Lock()
	defer generator.Unlock()
	before, err := aten.RandomState("cpu")
	if err != nil {
		return nil, err
	}
	defer before.Free()
	tokens, err := a.batch.Next()
	if again := aten.SetRandomState("cpu", before); err == nil {
		err = again
	}
	return tokens, err
}

// saved is what the lines of a step have kept.
type saved struct {
	of      [][]graph.Result // by member
	tensors []aten.Tensor
}

// begun starts the forward pass of a step, with the lines of all. t says whose nodes are whose, where there are some.
func (a *Alongside) begun() (run *host.Run, t *together, err error) {
	if !slices.ContainsFunc(a.all, (*grown).speaks) {
		run, err = a.batch.Begin(&graph.Graph{}, nil, true)
		return run, nil, err
	}
	t = &together{graph: &graph.Graph{}}
	rows := make([]int, len(a.all))
	for i, g := range a.all {
		rows[i] = g.rows
		if !g.speaks() {
			t.starts = append(t.starts, graph.ID(len(t.graph.Nodes)))
			t.graph.Invokes = append(t.graph.Invokes, graph.Invoke{})
			continue
		}
		if err := t.add(g.performing, g.step); err != nil {
			aten.FreeAll(t.consts)
			return nil, t, err
		}
	}
	for i := range t.graph.Invokes {
		t.graph.Invokes[i].NoGrad = false // nothing here has a gradient
	}
	run, err = a.batch.BeginParts(t.graph, rows, t.consts)
	return run, t, err
}

// speaks reports whether it has lines at the step that comes next.
func (g *grown) speaks() bool { return len(g.request.programs[g.step].graph.Nodes) > 0 }

// run does the forward pass of a step, with the lines of all. to is the member whose line failed, if one did.
func (a *Alongside) run(ctx context.Context) (out saved, to *grown, err error) {
	run, t, err := a.begun()
	var results []graph.Result
	if err == nil {
		results, out.tensors, err = finish(ctx, run)
	}
	if err != nil {
		return out, a.whose(t, fault.As(err).Node), err
	}
	out.of = make([][]graph.Result, len(a.all))
	for i := range out.of {
		if t != nil {
			out.of[i] = t.own(i, results)
		}
	}
	return out, nil, nil
}

// whose is the member whose node it is, of those that were put together; nil where it is nobody's.
func (a *Alongside) whose(t *together, node int) *grown {
	switch {
	case t == nil:
		return nil
	case len(t.starts) < len(a.all):
		return a.all[len(t.starts)] // it could not be added
	}
	for i, g := range a.all {
		if from, end := t.nodes(i); graph.ID(node) >= from && graph.ID(node) < end {
			return g
		}
	}
	return nil
}

// Step does the next step of all. Where a line of one of them fails, that one leaves, and the others go on. Where it fails
// otherwise they have ended, and none is done.
func (a *Alongside) Step(ctx context.Context) error {
	for len(a.all) > 0 {
		to, err := a.tried(ctx)
		if err == nil || to == nil {
			return err
		}
		a.part(to, err)
		if err := a.Leave(to.request); err != nil {
			return err
		}
	}
	return nil
}

// part notes that a member is to run alone.
func (a *Alongside) part(g *grown, why error) {
	a.apart, a.why = append(a.apart, g.request), why
}

// tried does the next step of all. It gives the member whose line it was, where one failed: the step has not been done then.
func (a *Alongside) tried(ctx context.Context) (*grown, error) {
	if ctx.Err() != nil {
		return nil, cancelled(ctx)
	}
	found, to, err := a.run(ctx)
	if err != nil {
		return to, err
	}
	defer func() { aten.FreeAll(found.tensors) }()
	tokens, err := a.drawn()
	if err != nil {
		return nil, err
	}
	return nil, a.grow(tokens, found)
}

// grow gives each its tokens and what it has kept, and ends those that are done, or cannot take it.
func (a *Alongside) grow(tokens []int64, found saved) error {
	ended, next := a.batch.Ended(), 0
	return a.leave(func(g *grown, rows []int) (bool, error) {
		own := make([]int64, len(rows))
		over := true
		for i, r := range rows {
			own[i], over = tokens[r], over && ended[r]
		}
		kept := found.of[next]
		next++
		done, err := g.undrawn()
		if err == nil {
			done, err = g.take(own, over, kept, found.tensors)
		}
		var response []byte
		if err == nil && done {
			response, err = g.told()
		}
		switch {
		case err != nil:
			a.part(g, err)
		case done:
			a.grew = append(a.grew, Grown{g.request, response})
		}
		return done || err != nil, nil
	})
}

// undrawn is why its tokens could not be drawn, if they could not.
func (g *grown) undrawn() (done bool, err error) {
	if g.draws == nil {
		return false, nil
	}
	return false, g.draws.Failed()
}

// told is the response, with the state that its generator is in by now.
func (g *grown) told() ([]byte, error) {
	if g.draws == nil {
		return g.file()
	}
	return g.fileWith(g.draws.State())
}

// Leave ends a request before it is done.
func (a *Alongside) Leave(r *Request) error {
	return a.leave(func(g *grown, _ []int) (bool, error) { return g.request == r, nil })
}

// leave lets those go of which f says so, which is told their rows.
func (a *Alongside) leave(f func(g *grown, rows []int) (bool, error)) error {
	var stay []*grown
	var keep []int
	row := 0
	for _, g := range a.all {
		var rows []int
		for range g.rows {
			rows = append(rows, row)
			row++
		}
		gone, err := f(g, rows)
		if err != nil {
			return err
		}
		if !gone {
			stay, keep = append(stay, g), append(keep, rows...)
		}
	}
	switch {
	case len(stay) == 0:
		a.Free()
		return nil
	case len(stay) == len(a.all):
	case a.batch.Done():
		return fault.New(fault.Internal, "a batch of generations ended before one of them")
	default:
		if err := a.batch.Keep(keep); err != nil {
			return err
		}
	}
	a.all = stay
	return nil
}

// generateTogether runs generations of one company, each until it is done, in the same steps.
func (p *Performer) generateTogether(ctx context.Context, requests []*Request) ([][]byte, error) {
	a := p.Alongside()
	defer a.Free()
	err := a.Join(ctx, requests)
	for err == nil && a.Open() > 0 {
		err = a.Step(ctx)
	}
	if err != nil {
		return nil, err
	}
	if len(a.apart) > 0 {
		return nil, a.why
	}
	out := make([][]byte, len(requests))
	for _, done := range a.Grown() {
		out[slices.Index(requests, done.Request)] = done.Response
	}
	return out, nil
}

// take notes what a step has drawn and kept for it, and reports whether it is done: it has all tokens, or all of its rows
// have ended.
func (g *grown) take(tokens []int64, over bool, kept []graph.Result, tensors []aten.Tensor) (done bool, err error) {
	number := g.step
	s := &g.request.Steps[number]
	g.step++
	done = over || g.step >= g.request.Settings.MaxNewTokens
	if len(s.Want) == 0 {
		return done, nil
	}
	step, err := g.answer(kept, tensors, s)
	if err != nil {
		return done, err
	}
	step.Step = number
	if slices.Contains(s.Want, WantDrawn) {
		step.Drawn = &Drawn{Tokens: tokens, Done: done}
	}
	g.response.Steps = append(g.response.Steps, step)
	return done, nil
}
