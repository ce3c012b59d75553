package pack

import "github.com/nnsight-go/nnsight-go/engine/plan"

// want says that somebody looks at a token.
func (x *activation) want(t token) {
	if x.single {
		x.whole = true
		return
	}
	if x.wanted == nil {
		x.wanted = make([]bool, len(x.classes.first))
	}
	x.wanted[x.classes.of[t]] = true
}

// wantAll says that somebody looks at the tensor itself.
func (x *activation) wantAll() { x.whole = true }

// needed reports whether anybody looks at it.
func (x *activation) needed() bool { return x.whole || x.wanted != nil }

// list are the classes to be computed, in order, each by its first token.
func (x *activation) list() []token {
	if x.whole {
		return x.classes.first
	}
	var out []token
	for c, yes := range x.wanted {
		if yes {
			out = append(out, x.classes.first[c])
		}
	}
	return out
}

// demand goes back through the schedule and finds which tokens are wanted. It reports whether that saves anything.
func (t *trace) demand() bool {
	saves := false
	for i := len(t.steps) - 1; i >= 0; i-- {
		s := &t.steps[i]
		t.want(s)
		saves = saves || s.packed && s.in.Op != plan.OpItem
	}
	return saves
}

func (t *trace) want(s *step) {
	switch s.kind {
	case mapped, attend:
		if !s.out.needed() {
			return
		}
		list := s.out.list()
		if s.in.Op == plan.OpItem && !s.out.fixed && !s.out.whole { // a view of what its container is
			s.packed = true
			for _, u := range list {
				s.args[0].want(u)
			}
			return
		}
		if s.out.fixed || s.out.several && s.out.whole || len(list)*10 > s.out.space.size()*enough {
			s.out.whole = true
			s.wantWhole()
			return
		}
		s.packed = true
		if s.kind == attend {
			s.wantAttended(list)
			return
		}
		for _, x := range s.args {
			for _, u := range list {
				x.want(u)
			}
		}
	case rows:
		x := s.args[0]
		if s.out.fixed {
			s.out.whole = true
		}
		if s.out.whole {
			for _, u := range s.out.part {
				x.want(u)
			}
			return
		}
		for _, u := range s.out.list() {
			x.want(s.out.part[u])
		}
	case index:
		x := s.args[0]
		for _, u := range x.space.within(s.span) {
			x.want(u)
		}
	case put:
		t.wantPut(s)
	case alias:
		x := s.args[0]
		if s.out.fixed {
			s.out.whole = true
		}
		if s.out.whole {
			x.wantAll()
			return
		}
		for _, u := range s.out.list() {
			x.want(u)
		}
	default:
		s.wantWhole()
	}
}

// wantWhole is for a step that is left as it was.
func (s *step) wantWhole() {
	for _, x := range s.args {
		x.wantAll()
	}
	s.changeInPlace()
}

// changeInPlace is for a step that changes tensors: they must be there before, and are changed for all that share their storage.
func (s *step) changeInPlace() {
	for i, x := range s.before {
		if s.after[i].needed() {
			x.wantAll()
		}
	}
}

// wantPut asks for the tokens that an invoke has changed from the invoke, and for the others from the activation.
func (t *trace) wantPut(s *step) {
	value := s.arg(&s.in.Args[1])
	x := s.arg(&s.in.Args[0])
	if !x.fixed && !s.out.needed() {
		return
	}
	if value != nil {
		value.wantAll()
	}
	switch {
	case x.fixed:
		x.wantAll()
		s.changeInPlace()
	case s.out.whole: // written in place
		x.wantAll()
	default:
		_, _, others := s.divided()
		for _, u := range others {
			x.want(u)
		}
	}
}

// divided are the tokens to be computed of what an invoke wrote to: those that it has changed, where they are in what
// it wrote, and the others.
func (s *step) divided() (mine []token, at []int64, others []token) {
	place := make(map[token]token, len(s.new)) // of the base: as a token of the value
	for i, t := range s.new {
		place[t] = s.at[i]
	}
	for _, t := range s.out.list() {
		if p, ok := place[t]; ok {
			mine, at = append(mine, t), append(at, int64(p))
		} else {
			others = append(others, t)
		}
	}
	return mine, at, others
}

// wantAttended asks for the queries of these tokens, and for the keys and values that they look at.
func (s *step) wantAttended(list []token) {
	q, k, v := s.arg(&s.in.Args[0]), s.arg(&s.in.Args[1]), s.arg(&s.in.Args[2])
	seen := make([]bool, q.space.size())
	for _, u := range list {
		q.want(u)
		for _, w := range q.space.seen(u) {
			if !seen[w] {
				seen[w] = true
				k.want(w)
				v.want(w)
			}
		}
	}
}
