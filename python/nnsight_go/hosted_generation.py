"""Generation of a hosted language model: transformers' own loop, which waits between its steps.

The loop runs on a thread of its own, one of the two at a time. A step is a pass to the engine: from the end of the
step before it to the end of the model's forward, so that what an encoder does belongs to step 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from . import _ffi, hosting, positions, settings, torchmap, wire
from .continuation import Continuation
from .drawing import Drawing
from .errors import InputError
from .generation import Generation, StepRecorder
from .hosted import Hosted, HostedRun, Layout
from .hosted_skipping import Beside, Leaving
from .hosting import Paused, Spot
from .native import Run
from .points import Constant, Leaf, Mapping, Tree
from .points import Sequence as Items
from .positions import here
from .straight import Straight
from .wire import Kind
from .wrapping import ROW, HostedRecorder

if TYPE_CHECKING:
    from .edits import Edit
    from .hosted_language import HostedLanguageModel

_FIRST, _LAST = Spot("", wire.INPUT, 0), Spot("", wire.OUTPUT, 0)  # where a step begins and ends
_KEPT = 64  # layouts of steps that a model remembers
_TRIED = 3  # steps of a generation that is tried out: a prompt, and two of which the second is longer


class Tokens:
    """A stopping criterion that stops nothing: it sees the tokens of each step."""

    ids: torch.Tensor | None = None

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """As transformers calls it."""
        self.ids = ids
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


class _OfStep:
    """Counts calls of modules from the beginning of each step; hooks count them from that of the loop."""

    def __init__(self) -> None:
        self._calls: dict[tuple[str, int], int] = {}  # of each side of a module so far
        self._before: dict[tuple[str, int], int] = {}  # and when the step began

    def at(self, spot: Spot) -> Spot:
        """The access point of the step that the loop has come to."""
        side = (spot.path, spot.port)
        self._calls[side] = spot.call + 1
        return Spot(*side, spot.call - self._before.get(side, 0))

    def begin(self) -> None:
        """Begins the next step."""
        self._before = dict(self._calls)


class Stepping(Paused):
    """The loop on its thread, which stands at an access point, at the end of a step or between two."""

    def __init__(self, hosted: Hosted, loop: Callable[[], Any]) -> None:
        super().__init__(self._generate)
        self._hosted, self._loop = hosted, loop
        self.result: Any = None
        self.leaving: Leaving | None = None  # what the step leaves out
        self._counted = _OfStep()
        self._stands: Spot | None = None

    def _generate(self, visit: hosting.Visit) -> None:
        assert self.leaving is not None
        modules = self._hosted.modules
        with self.leaving.over(modules, modules, visit) as of_step:

            def at(spot: Spot, value: Any) -> Any:
                return of_step(self._counted.at(spot), value)

            with self._hosted.hooked(at):
                self.result = hosting.called(self._loop)

    def go(self, spot: Spot | None) -> bool:
        """Goes on to an access point of the step, or to its end, and tells whether it is there."""
        wanted = spot or _LAST
        if self._stands != wanted and self._stands != _LAST:
            super().go(wanted)
        return self._stands == wanted

    def unwind(self) -> None:
        """Ends the loop where it stands."""
        self._stands = None
        super().unwind()

    def next(self) -> bool:
        """Lets the tokens of the step that has ended be drawn, and tells whether another one follows."""
        self._stands = None
        self._counted.begin()
        return super().go(_FIRST)

    def _visit(self, spot: Spot, value: Any) -> Any:
        if spot not in (self._target, _LAST):
            return value
        self._stands, self._value = spot, value
        self._here.release()
        self._there.acquire()
        if self._unwinding:
            raise hosting.Unwind
        out, self._value = self._value, None
        return out


class StepRun(HostedRun):
    """One step on its way through the engine and transformers' loop."""

    def __init__(self, stepping: Stepping, hosted: Hosted, layout: Layout, graph: bytes, constants: Any, end: bool):
        super().__init__(hosted, layout, [((), {})], graph, constants, end)
        self._paused = stepping

    def free(self) -> None:
        """Ends the run of the step; the loop goes on."""
        self._paused = None
        super().free()


class HostedStepRecorder(StepRecorder, HostedRecorder):
    """Records what the program does at one step."""

    generation: HostedGeneration
    _rows = ROW

    def __init__(self, generation: HostedGeneration, step: int) -> None:
        super().__init__(generation, step)
        self.given.append(((), {}))

    def layout(self, invoke: int) -> Layout:
        """The access points of the step."""
        return self.generation.layout(self.step)

    batch = HostedRecorder.batch

    def _bring(self, edit: Edit) -> None:
        """Puts an edit ahead of the step's lines. One of what runs in step 0 alone, an encoder, is done then."""
        points = self.layout(0).points
        named = {(node[4], node[5]) for node in edit.recording.nodes if node[0] in (Kind.READ, Kind.WRITE)}
        if self.step == 0 or points.keys() >= named | {(name, wire.OUTPUT) for name in edit.skips}:
            super()._bring(edit)

    def complete(self) -> Callable[[], None]:
        """Runs the step to its end, edits included. Every value of it that is in use somewhere becomes its tensor."""
        last = self._carry_on()  # in use until the step has run
        done = super().complete()
        del last
        return done

    def _leaf_meta(self, invoke: int, order: int, leaf: Leaf, writes: int) -> torch.Tensor:
        self.pinned = self.pinned or here()
        shape = self.generation.sizes_of(self.step, order, leaf.name)
        return HostedRecorder._leaf_meta(self, invoke, order, dataclasses.replace(leaf, shape=shape), writes)

    def operations(self, path: str, name: str) -> NoReturn:
        """Refuses: the loop's passes are not looked into."""
        raise InputError(
            f"{name} is not known during a generation of a wrapped model",
            path=path,
            hint="Use it in `with model.trace(...):`.",
            **positions.fields(here()),
        )

    def _go_on(self, ids: list[int], end: bool, adopt: Any) -> list[torch.Tensor]:
        self.generation.leave_out(self.step, self.left.setdefault(0, {}))
        return super()._go_on(ids, end, adopt)

    def _do(self, block: Straight, ids: list[int]) -> None:
        """A step of which nothing is asked."""
        self.generation.stepping.go(None)

    def _begin(self, data: bytes, constants: list[torch.Tensor], end: bool) -> Run:
        run = StepRun(self.generation.stepping, self.hosted, self.layout(self.invoke), data, constants, end)
        run.absent = self._absent
        return run


class HostedGeneration(Generation):
    """A batch of rows that transformers' loop continues, step by step, with what the program does at each."""

    native: Any

    def __init__(self, model: HostedLanguageModel, given: dict[str, Any], options: dict[str, Any]) -> None:
        self._hosted: Hosted = model._hosted
        self._module: Any = model._module
        self._open(self._hosted, model._edits, Drawing(options))
        self._inputs, self._options = given, options
        prompts = self._prompts()
        self.most = self._new_tokens(prompts.shape[1])
        each = max(self._setting("num_beams") or 1, self._setting("num_return_sequences") or 1)
        self.rows = prompts.repeat_interleave(each, 0).tolist()  # side by side
        self.sizes = len(self.rows), prompts.shape[1]
        self._layouts: list[Layout] | None = None
        self._tokens = Tokens()
        self._leaves = -1  # the step of which the loop knows what it leaves out
        self.stepping = Stepping(self._hosted, self._loop)

    def _setting(self, name: str) -> Any:
        return _setting(self._module, self._options, name)

    def _prompts(self) -> torch.Tensor:
        """The tokens that step 0 sees, ``[batch, seq]``: of an encoder-decoder, what its decoder begins with."""
        name = "decoder_input_ids" if getattr(self._module.config, "is_encoder_decoder", False) else "input_ids"
        given = self._inputs.get(name)
        if given is not None:
            prompts: torch.Tensor = given
            return prompts
        start = self._setting("decoder_start_token_id")
        start = self._setting("bos_token_id") if start is None else start
        rows = next((len(x) for x in self._inputs.values() if isinstance(x, torch.Tensor) and x.dim()), 1)
        return torch.full((rows, 1), start or 0, device=self._hosted.device)

    def _new_tokens(self, prompt: int) -> int:
        """How many steps there are at most."""
        new, longest = self._setting("max_new_tokens"), self._setting("max_length")
        if new is None:
            new = settings.DEFAULT_NEW_TOKENS if longest is None else longest - prompt
        settings.check_new_tokens(new, prompt)
        return int(new)

    def _loop(self) -> Any:
        options = dict(self._options)
        if self.drawing.processes:
            options["logits_processor"] = [self.drawing.process]
        criteria = [self.drawing.ends] if self.drawing.criteria else []
        options["stopping_criteria"] = [*criteria, self._tokens]
        if self.drawing.scores is not None:
            options["return_dict_in_generate"] = options["output_scores"] = True
        return self._module.generate(**self._inputs, streamer=self.drawing.streamer, **options)

    # ---- what steps look like ----

    def layout(self, step: int) -> Layout:
        """The access points of a step."""
        if self._layouts is None:
            self._layouts = self._hosted.steps.get(self._kind(exact=False)) or self._try_out()
        known = self._layouts
        return known[min(step, 1, len(known) - 1)]

    def leave_out(self, step: int, left: dict[str, Beside]) -> None:
        """Says which calls of modules a step leaves out, which is the next one to run, or under way."""
        if step == self._leaves:
            return
        self._leaves, leaving = step, self.stepping.leaving
        if leaving is None:
            self.stepping.leaving = Leaving(self.layout(step), left)
        else:
            leaving.begin(self.layout(step), left)

    def sizes_of(self, step: int, order: int, leaf: str) -> tuple[int, ...]:
        """The sizes of a tensor at an access point of a step: from one step to the next they grow evenly."""
        known = self._hosted.steps.get(self._kind(exact=True)) or self._try_out()
        spot = self.layout(step).spots[order]

        def sizes(layout: Layout) -> list[int]:
            point = layout.points.get((spot.name, spot.port))
            for x in hosting.leaves(point.tree) if point else ():
                if x.name == leaf:
                    return [int(size) for size in x.shape]
            raise NotImplementedError("this step goes another way than the others")

        if step < len(known):
            return tuple(sizes(known[step]))
        if len(known) < _TRIED:
            raise NotImplementedError("the sizes of so late a step are not known")
        pairs = zip(sizes(known[-2]), sizes(known[-1]), strict=True)
        return tuple(two + (step - len(known) + 1) * (two - one) for one, two in pairs)

    def _kind(self, exact: bool) -> Any:
        """What decides about the access points of steps, or about all of their sizes."""

        def rough(x: torch.Tensor) -> Any:
            return (str(x.dtype), x.dim())

        given = self._inputs if exact else hosting.mapped(self._inputs, rough)
        options = {k: v for k, v in self._options.items() if k != "max_new_tokens"}
        return exact, min(self.most, _TRIED), _ffi.calls()["frozen"](options), self._hosted.kind(((), given))

    def _try_out(self) -> list[Layout]:
        """Generates a few tokens from copies, to know what steps come to."""
        spots: list[list[Spot]] = [[]]
        trees: list[dict[tuple[str, int], Tree]] = [{}]
        templates: list[dict[str, Any]] = [{}]
        counted = _OfStep()

        def visit(spot: Spot, value: Any) -> Any:
            of_step = counted.at(spot)
            spots[-1].append(of_step)
            tree = hosting.structure(value)
            trees[-1][of_step.name, of_step.port] = _without_objects(tree)
            if of_step.port == wire.OUTPUT and not isinstance(tree, Leaf):
                templates[-1][of_step.name] = hosting.template(tree, value)
            if of_step == _LAST:
                counted.begin()
                spots.append([])
                trees.append({})
                templates.append({})
            return value

        options = {k: v for k, v in self._options.items() if k not in ("min_new_tokens", "max_length")}
        steps = min(self.most, _TRIED)
        given = hosting.mapped(self._inputs, torch.clone)
        with self._hosted.aside(), self._hosted.hooked(visit):
            options |= {"max_new_tokens": steps, "min_new_tokens": steps}
            hosting.called(self._module.generate, **given, **options)
        parts = zip(spots[:steps], trees[:steps], templates[:steps], strict=True)
        layouts = [Layout.of(s, t, templates=m) for s, t, m in parts if s]
        for exact in (True, False):
            self._hosted.steps[self._kind(exact)] = layouts
        while len(self._hosted.steps) > _KEPT:
            self._hosted.steps.popitem(last=False)
        return layouts

    # ---- steps ----

    def _record(self, step: int) -> StepRecorder:
        return HostedStepRecorder(self, step)

    def _draw(self) -> bool:
        more = self.stepping.next()
        ids = self._tokens.ids
        if ids is not None:
            self.rows = ids.tolist()
        return not more

    def finish(self, steps: int | None = None) -> torch.Tensor:
        """Runs to the end, or so many steps, and gives all tokens ``[batch, seq]``."""
        self.run_to(self.most if steps is None else steps)
        for loop in self.loops:
            loop.end()
        result, scores = self.stepping.result, self.drawing.scores
        if result is None:  # it was stopped
            return torch.tensor(self.rows, device=self._hosted.device)
        if scores is not None:
            scores.extend(result.scores)
        tokens: torch.Tensor = result if isinstance(result, torch.Tensor) else result.sequences
        return tokens

    def _free(self) -> None:
        self.stepping.unwind()


class HostedContinuation(Continuation):
    """An input of a wrapped model, its generation, and the tokens that it gives."""

    def __init__(
        self, model: HostedLanguageModel, args: tuple[Any, ...], by_name: dict[str, Any], options: dict[str, Any]
    ) -> None:
        options = dict(options)
        pad, ends = (_setting(model._module, options, name) for name in ("pad_token_id", "eos_token_id"))
        options["pad_token_id"] = settings.padding(pad, settings.ids_of(ends))
        given = model._prompt(args, by_name, options["pad_token_id"])
        self.generation = HostedGeneration(model, given, options)
        self.generation.input = self
        self._awaited = []
        self._tokens = None
        self._mode = torchmap.Mode()


def _setting(module: Any, options: dict[str, Any], name: str) -> Any:
    """What transformers will take a setting for."""
    if options.get(name) is not None:
        return options[name]
    stored = options.get("generation_config") or getattr(module, "generation_config", None)
    return getattr(stored, name, None)


def _without_objects(tree: Tree) -> Tree:
    """A structure that keeps no object of the generation that was tried out, such as its keys and values."""
    match tree:
        case Constant(value=value):
            return tree if hosting.is_plain(value) else Constant(Unseen(type(value).__name__))
        case Items():
            return dataclasses.replace(tree, items=tuple(map(_without_objects, tree.items)))
        case Mapping():
            return dataclasses.replace(tree, fields={k: _without_objects(v) for k, v in tree.fields.items()})
    return tree


class Unseen:
    """Stands for an object that modules hand on, and that a block cannot look into."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __repr__(self) -> str:
        return f"<a {self._kind}, which a block does not see>"
