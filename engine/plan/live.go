package plan

import "github.com/nnsight-go/nnsight-go/engine/graph"

// aliases groups slots that may share storage (union-find).
type aliases []Slot

func newAliases(n int) aliases {
	a := make(aliases, n)
	for i := range a {
		a[i] = Slot(i)
	}
	return a
}

func (a aliases) find(s Slot) Slot {
	for a[s] != s {
		a[s] = a[a[s]]
		s = a[s]
	}
	return s
}

func (a aliases) join(x, y Slot) { a[a.find(x)] = a.find(y) }

// dropDead removes instructions whose result nobody uses and whose changes nobody can see; keep
// says which slots are used afterwards. A change can be seen through anything that may share storage
// with its target, and always in a tensor that is not the run's own: a parameter, a
// constant, or what hosted modules gave and go on with: visible. A guard stays: a change that comes
// too late is an error, and the more so where nobody would notice.
func dropDead(s *Schedule, keep []bool, alias aliases, visible []Slot) {
	used := make([]bool, s.Slots)
	seen := make([]bool, s.Slots) // by group
	use := func(r Slot) {
		used[r] = true
		seen[alias.find(r)] = true
	}
	for slot := range keep {
		if keep[slot] {
			use(Slot(slot))
		}
		if s.Borrowed[slot] {
			seen[alias.find(Slot(slot))] = true
		}
	}
	for _, slot := range visible {
		seen[alias.find(slot)] = true
	}
	kept := len(s.Instrs)
	for i := len(s.Instrs) - 1; i >= 0; i-- {
		in := &s.Instrs[i]
		live := in.Out != NoSlot && used[in.Out] || in.Op == OpCall && (isRandom(in.Name) || isLasting(in.Name)) && in.Node != graph.NoID
		live = live || in.Op == OpGuard || in.Op == OpTrack || in.Op == OpSetGrad || in.Op == OpBackward || in.Op == OpGive
		if in.Mutate {
			in.Target(func(r Slot) { live = live || seen[alias.find(r)] })
		}
		if in.Op == OpExpect {
			in.Refs(func(r Slot) { live = live || used[r] })
		}
		if live {
			in.Refs(use)
			kept--
			s.Instrs[kept] = *in
		}
	}
	s.Instrs = append(s.Instrs[:0], s.Instrs[kept:]...)
}

// Target calls f for each slot the instruction changes in place.
func (in *Instr) Target(f func(Slot)) {
	for i := range in.Kwargs {
		if in.Kwargs[i].Name == "out" {
			in.Kwargs[i].Arg.Refs(f)
			return
		}
	}
	in.Args[0].Refs(f)
}

// shares calls f for each slot that the result, if there is one, may share storage with.
func (in *Instr) shares(f func(Slot)) {
	switch {
	case in.Out == NoSlot:
	case in.Mutate && baseName(in.Name) != "set_":
		in.Target(f)
	case !in.Fresh:
		in.Refs(f)
	}
}

// Refs calls f for each slot the instruction uses.
func (in *Instr) Refs(f func(Slot)) {
	for i := range in.Args {
		in.Args[i].Refs(f)
	}
	for i := range in.Kwargs {
		in.Kwargs[i].Arg.Refs(f)
	}
}

// markLastUses notes after which instruction each slot is dead. Those to keep live on; borrowed ones
// are not the run's to free. What is alive from before and has no use any more is dead at once.
func markLastUses(s *Schedule, keep, alive []bool) {
	last := make([]int, s.Slots)
	for i := range last {
		last[i] = -1
	}
	for i := range s.Instrs {
		in := &s.Instrs[i]
		if in.Out != NoSlot {
			last[in.Out] = i
		}
		in.Refs(func(r Slot) { last[r] = i })
	}
	s.used = make([]bool, s.Slots)
	for slot, i := range last {
		s.used[slot] = i >= 0
		switch {
		case keep[slot] || s.Borrowed[slot]:
		case i >= 0:
			s.Instrs[i].Frees = append(s.Instrs[i].Frees, Slot(slot))
		case alive[slot]:
			s.Freed = append(s.Freed, Slot(slot))
		}
	}
}

// bindings gives the sources that this schedule needs for the first time; they are alive from now on.
func bindings(sources []Source, s *Schedule, keep, alive []bool) []Source {
	var now []Source
	for _, src := range sources {
		if !alive[src.Slot] && (s.used[src.Slot] || keep[src.Slot]) {
			now = append(now, src)
			alive[src.Slot] = true
		}
	}
	return now
}

// Finish says anew where values die, after instructions of a schedule for a whole program were replaced.
func (s *Schedule) Finish() {
	keep, alive := make([]bool, s.Slots), make([]bool, s.Slots)
	for i := range s.Saved {
		s.Saved[i].Value.Refs(func(slot Slot) { keep[slot] = true })
	}
	for i := range s.Instrs {
		s.Instrs[i].Frees = nil
	}
	markLastUses(s, keep, alive)
	s.Sources = bindings(s.Sources, s, keep, alive)
}
