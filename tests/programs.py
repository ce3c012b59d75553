"""Random programs that read, change and patch a model, and their meaning told by plain hooks.

A program is text: lines in the order of the forward pass, each with the access point at which it
stands. ``source`` puts them into a trace. ``interpret`` knows nothing of traces: it runs the same lines
on real tensors inside of hooks on transformers' model, invoke after invoke.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import einops
import torch

from references import Pair, Place, hooked, main, prompt

PATHS: dict[str, list[str]] = {
    "gpt2": """transformer.wte transformer.drop transformer.h.{} transformer.h.{}.ln_1 transformer.h.{}.attn
    transformer.h.{}.attn.c_attn transformer.h.{}.attn.c_proj transformer.h.{}.attn.resid_dropout transformer.h.{}.ln_2
    transformer.h.{}.mlp transformer.h.{}.mlp.c_fc transformer.h.{}.mlp.act transformer.h.{}.mlp.c_proj
    transformer.h.{}.mlp.dropout transformer.ln_f lm_head""".split(),
    "llama": """model.embed_tokens model.layers.{} model.layers.{}.input_layernorm model.layers.{}.self_attn
    model.layers.{}.self_attn.q_proj model.layers.{}.self_attn.v_proj model.layers.{}.self_attn.o_proj
    model.layers.{}.post_attention_layernorm model.layers.{}.mlp model.layers.{}.mlp.gate_proj
    model.layers.{}.mlp.act_fn model.layers.{}.mlp.up_proj model.layers.{}.mlp.down_proj model.norm lm_head""".split(),
}
ATTENTION = (".attn", ".self_attn")  # these and blocks give tuples
IDS = ("transformer.wte", "model.embed_tokens")  # their inputs are token ids


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a program.

    ``text`` is Python on variables and ``model``. Where ``place`` is not None, ``{}`` in it stands for
    that access point and the line runs there; else it runs where the line before it did. ``rebinds``:
    the line assigns to the access point.
    """

    text: str
    place: Place | None = None
    rebinds: bool = False


@dataclasses.dataclass(frozen=True)
class Invoke:
    """One input, and what is done with it."""

    rows: list[list[int]]
    lines: list[Line]


@dataclasses.dataclass(frozen=True)
class Program:
    """Invokes, and the variables that are saved."""

    invokes: list[Invoke]
    saved: list[str]


def written(place: Place) -> str:
    """An access point as a user writes it."""
    path, port = place
    parts = [f"[{part}]" if part.isdigit() else f".{part}" for part in path.split(".")]
    tuples = path.split(".")[-1].isdigit() or path.endswith(ATTENTION)
    return f"model{''.join(parts)}.{port}" + ("[0]" if port == "output" and tuples else "")


def source(program: Program) -> str:
    """The program as a trace."""
    out = ["with model.trace() as tracer:"]
    for invoke in program.invokes:
        out.append(f"    with tracer.invoke({invoke.rows}):")
        for line in invoke.lines:
            text = line.text.replace("{}", written(line.place)) if line.place else line.text
            out.append(f"        {text}")
            name = text.split(" = ")[0]
            if name in program.saved:
                out.append(f"        {name}.save()")
        if not invoke.lines:
            out.append("        pass")
    return "\n".join(out) + "\n"


def interpret(program: Program, pair: Pair, order: dict[Place, int], names: dict[str, Any], grad: bool = False) -> None:
    """Runs the program by hooks; ``names`` are its variables, before and after. ``grad``: autograd records it."""
    names["model"] = pair.hf
    with torch.set_grad_enabled(grad):
        for invoke in program.invokes:
            _Interpreter(invoke.lines, order, names, grad).run(pair, invoke.rows)


class _Interpreter:
    """The run of one invoke: ``next`` is the line to come, ``bound`` what stands at the points met so far."""

    def __init__(self, lines: list[Line], order: dict[Place, int], names: dict[str, Any], grad: bool = False) -> None:
        self.lines, self.order, self.names, self.grad = lines, order, names, grad
        self.next = 0
        self.bound: dict[Place, torch.Tensor] = {}

    def run(self, pair: Pair, rows: list[list[int]]) -> None:
        hooked(pair.hf, self.at, self.grad, input_ids=torch.tensor(rows))
        assert self.next == len(self.lines), "each line stands at a point that the forward pass meets"

    def at(self, place: Place, value: torch.Tensor) -> torch.Tensor | None:
        self.bound[place] = value
        now = self.order[place]
        while self.next < len(self.lines):
            line = self.lines[self.next]
            if line.place is not None and self.order[line.place] > now:
                break
            self.do(line)
            self.next += 1
        return None if self.bound[place] is value else self.bound[place]

    def do(self, line: Line) -> None:
        if line.place is None:
            exec(line.text, self.names)
            return
        self.names["point"] = self.bound[line.place]
        exec(line.text.replace("{}", "point"), self.names)
        if line.rebinds:
            self.bound[line.place] = self.names["point"]


# ---- what programs find ----


class Autoencoder(torch.nn.Module):
    """A sparse autoencoder of whatever width it meets first, as users bring them."""

    def __init__(self) -> None:
        super().__init__()
        self.dictionaries: dict[int, torch.nn.Linear] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1]
        if width not in self.dictionaries:
            with torch.random.fork_rng():
                torch.manual_seed(width)
                self.dictionaries[width] = torch.nn.Linear(width, 2 * width).requires_grad_(False)
        layer = self.dictionaries[width]
        features = torch.relu(layer(x - layer.weight.mean(0)))
        return features @ layer.weight + layer.weight.mean(0)


def surroundings(maker: Maker) -> dict[str, Any]:
    """Libraries, an autoencoder, constants of each width, and a tensor to write to."""
    torch.manual_seed(3)
    constants = {f"c{width}": 0.5 * torch.randn(1, 1, width) for width in sorted(set(maker.widths.values()))}
    return {"torch": torch, "einops": einops, "sae": Autoencoder(), "store": torch.zeros(1, 2, 2), **constants}


# ---- making programs ----


class _Alias:
    """What variables share one storage: the access points (of invokes) it stands at."""

    def __init__(self, *points: tuple[int, Place]) -> None:
        self.points = set(points)


@dataclasses.dataclass
class _Variable:
    name: str
    rows: int
    tokens: int
    width: int
    alias: _Alias


# Lines that compute a new value of the sizes of {0}; {1} is another of its width that broadcasts to it.
_FRESH = """
{0} * 0.5
{0} + {1}
{0} - {1} * 0.3
1 - {0}
{0} / ({0}.abs() + 1)
-{0} + {1}
torch.tanh({0})
torch.nn.functional.gelu({0})
{0}.clone()
{0}.softmax(-1)
{0} - {0}.mean(-1, keepdim=True)
{0} / {0}.norm(dim=-1, keepdim=True).clamp_min(0.1)
torch.where({0} > 0, {0}, {1} * 0.1)
{0}.flip(1)
{0}.cumsum(1)
torch.cat([{0}[:, 1:], {0}[:, :1]], 1)
torch.stack([{0}, {0} * 2]).sum(0)
{0}.masked_fill({0} > 0.4, 0.1)
torch.nn.functional.layer_norm({0}, {0}.shape[-1:])
({0}.transpose(1, 2) @ {0}).softmax(-1).sum(1, keepdim=True) + {0}
torch.einsum("btd,bsd->bts", {0}, {0}).tanh() @ {0}
{0} + 0.1 * torch.randn_like({0})
{0} * (torch.rand({0}.shape) > 0.3)
{0}.roll(1, -1)
{0}.lerp({1}, 0.25)
torch.addcmul({0}, {0}, {1}, value=0.1)
{0}.max(-1, keepdim=True).values.neg() + {0}
{0}.chunk(2, -1)[0].repeat(1, 1, 2)[..., :1] + {0}
sae({0})
einops.rearrange({0}, "b t d -> t b d").transpose(0, 1) * 1.5
{0} * float({1}.abs().mean())
{0} * 2 if {1}.sum() > 0.01 else {0} - 1
{0} + len({0}.tolist())
{0} * {0}.shape[1] / {0}.numel()
{0}.sort(-1).values + {1}
{0}.gather(-1, {0}.argsort(-1)) * 0.5
torch.nn.functional.one_hot({0}.argmax(-1), {0}.shape[-1]) - {0}
({0}.double() @ {0}.double().mT).float().tanh() @ {0}
torch.nn.functional.scaled_dot_product_attention({0}, {0}, {0}, is_causal=True)
torch.stack([row - row.mean() for row in {0}])
torch.std_mean({0}, -1, keepdim=True)[1] + {0}
{0} + store[:, :1, :1]
torch.tensor({0}.tolist()) * 0.5 + {0}
torch.nn.functional.pad({0}, (1, -1)) + {1}
{0}.unfold(-1, 2, 1).sum(-1).mean(-1, keepdim=True) + {0}
""".strip().splitlines()

# Lines that give a view of {0} of the same sizes.
_VIEWS = """
{0}[:]
{0}.view({0}.shape)
{0}.reshape({0}.shape)
{0}.transpose(0, 2).transpose(2, 0)
{0}.unsqueeze(0)[0]
""".strip().splitlines()

# What is assigned to {}, beside variables; {1} is of its width, and broadcasts to it.
_REPLACEMENTS = """
{} * 0.5
{} + 0.1 * torch.randn_like({})
{} + {1}
torch.zeros_like({}) + {1}
{} * 2 if {}.sum() > 0.01 else {} * 0.5
{}.clone()
{}[:]
""".strip().splitlines()

# Lines that change {0} in place; {1} is of its width, and broadcasts to it.
_IN_PLACE = """
{0}[:, -1] = {1}[:, -1]
{0}[:, -1, :] = 0
{0}[:, 0] += 0.5
{0}[..., ::3] = 0.25
{0}[:] = {1}
{0}[0, 0, 2] = 1.5
{0}[{0} > 0.3] = 0
{0}[:, :, [1, 3]] *= -1
{0} *= 0.5
{0} += {1}
{0} -= 0.1
{0}.add_({1}, alpha=0.5)
{0}.clamp_(-0.7, 0.9)
{0}.copy_({1})
{0}[:, -1].mul_(1.5)
{0}.transpose(1, 2)[:, 0] = 0.125
{0}.zero_()
{0}.mul_(float({1}.abs().mean()))
{0}[..., int({0}[0, 0].argmax())] = 0
{0}[{0} > 0.3] = {1}.mean()
{0}[:, 0], {0}[:, -1] = {0}[:, -1].clone(), {0}[:, 0].clone()
{0}.data.mul_(0.75)
{0}.detach()[:, -1] = 0.5
torch.nn.functional.relu({0}, inplace=True)
torch.mul({0}, 0.5, out={0})
{0}.scatter_(-1, {0}[..., :1].argmax(-1, keepdim=True), 0.3)
{0}.masked_fill_({0} < -0.5, -0.5)
for row in {0}[0]: row.mul_(0.9)
store[:, 0, 0] = {0}[0, -1, 0]
store.add_({0}.mean())
if {0}.mean() > 0.01: {0}.neg_()
""".strip().splitlines()


# Parts of lines that autograd has no history of, or that are computed where they stand.
_CONSTANT = "float(,tolist,if ,int(,argmax,argsort,double,store,.data,detach(),for row,out=".split(",")


class Maker:
    """Makes random programs for a model.

    Args:
        pair: the model.
        smooth: lines are those that autograd follows.
    """

    def __init__(self, pair: Pair, smooth: bool = False) -> None:
        config = pair.hf.config
        kept = [
            [line for line in lines if not smooth or not any(part in line for part in _CONSTANT)]
            for lines in (_FRESH, _IN_PLACE, _REPLACEMENTS)
        ]
        self.fresh, self.changes, self.replacements = kept
        seen = pair.run([0])
        self.order = {place: i for i, place in enumerate(seen)}
        layers = range(config.num_hidden_layers)
        paths = [p.format(i) for p in PATHS[config.model_type] for i in (layers if "{}" in p else [0])]
        places = [(p, port) for p in paths for port in ("input", "output") if not (port == "input" and p in IDS)]
        self.places = sorted(places, key=self.order.__getitem__)
        self.widths = {place: main(seen, *place).shape[-1] for place in places}
        self.config = config

    def make(self, seed: int) -> Program:
        """The program of a seed."""
        return _Making(self, random.Random(seed)).program()


class _Making:
    def __init__(self, maker: Maker, rng: random.Random) -> None:
        self.maker, self.rng = maker, rng
        self.variables: list[_Variable] = []
        self.bound: dict[tuple[int, Place], _Alias] = {}
        self.saved: list[str] = []
        self.invoke = 0
        self.lines: list[Line] = []
        self.at = -1  # how far this invoke has come, as an index into the places
        self.cut: dict[Place, int] = {}  # where it has put fewer tokens

    def program(self) -> Program:
        rng = self.rng
        actions = [self.read, self.compute, self.in_place, self.replace, self.resize, self.call, self.outside]
        longest = rng.choice([5, 9, 9, 25])
        invokes = []
        for self.invoke in range(rng.choice([1, 1, 2, 3, 4])):
            self.rows, self.tokens = rng.choice([1, 1, 1, 2]), rng.randint(1, 7)
            rows = [prompt(self.maker.config, self.tokens, seed=rng.randrange(1 << 30)) for _ in range(self.rows)]
            self.lines, self.at, self.cut = [], -1, {}
            for _ in range(rng.randint(1, longest)):
                rng.choices(actions, [8, 8, 8, 4, 1, 2, 1])[0]()
            if rng.random() < 0.8 or not self.saved:
                self.lines.append(Line(f"logits{self.invoke} = {{}}", ("lm_head", "output")))
                self.saved.append(f"logits{self.invoke}")
            invokes.append(Invoke(rows, self.lines))
        return Program(invokes, self.saved)

    def new(self, text: str, like: _Variable, place: Place | None = None) -> None:
        """A line that binds a new variable."""
        self.lines.append(Line(f"{like.name} = {text}", place))
        self.variables.append(like)
        if self.rng.random() < 0.5:
            self.saved.append(like.name)

    def variable(self, width: int, alias: _Alias, tokens: int | None = None, rows: int | None = None) -> _Variable:
        name = f"v{len(self.variables)}"
        return _Variable(name, rows or self.rows, self.tokens if tokens is None else tokens, width, alias)

    def alias(self, place: Place) -> _Alias:
        key = self.invoke, place
        return self.bound.setdefault(key, _Alias(key))

    def forward(self) -> Place:
        """A place from here on; the model has come to it then."""
        places, at = self.maker.places, max(self.at, 0)
        self.at = min(at + int(self.rng.expovariate(0.12)), len(places) - 1)
        return places[self.at]

    def here(self, place: Place) -> _Variable:
        """What is read at a place."""
        return self.variable(self.maker.widths[place], self.alias(place), self.cut.get(place))

    def read(self) -> None:
        place = self.forward()
        if self.rng.random() < 0.15:
            place = self.maker.places[self.rng.randint(0, self.at)]
        self.new("{}", self.here(place), place)

    def some(self) -> _Variable | None:
        """A variable, of whichever invoke."""
        return self.rng.choice(self.variables[-6:]) if self.variables else None

    def other(self, like: _Variable) -> str:
        """A tensor that broadcasts to another, perhaps of an earlier invoke."""
        options = [f"c{like.width}"]
        for v in self.variables[-6:]:
            if v.width == like.width and (v.rows, v.tokens) == (like.rows, like.tokens):
                options += [v.name] * 2
            elif v.width == like.width:
                options += [f"{v.name}[:1, -1:]"] * 2
        return self.rng.choice(options)

    def compute(self) -> None:
        a = self.some()
        if a is None:
            return self.read()
        if self.rng.random() < 0.2:
            text = self.rng.choice(_VIEWS).format(a.name)
            return self.new(text, self.variable(a.width, a.alias, a.tokens, a.rows))
        if self.rng.random() < 0.1:
            return self.new(f"{a.name}[:, -1:]", self.variable(a.width, a.alias, 1, a.rows))
        text = self.rng.choice(self.maker.fresh).format(a.name, self.other(a))
        if "rand" in text and self.rng.random() < 0.5:
            self.lines.append(Line(f"torch.manual_seed({self.rng.randint(0, 9)})"))
        self.new(text, self.variable(a.width, _Alias(), a.tokens, a.rows))
        return None

    def in_place(self) -> None:
        now = self.maker.places[self.at] if self.at >= 0 else None
        free = [v for v in self.variables[-6:] if v.alias.points <= {(self.invoke, now)}]
        if free and self.rng.random() < 0.6:
            v = self.rng.choice(free)
            self.lines.append(Line(self.rng.choice(self.maker.changes).format(v.name, self.other(v))))
            return
        place = self.forward()
        if not self.alias(place).points <= {(self.invoke, place)}:
            return  # what was assigned there stands somewhere else, too
        self.lines.append(Line(self.rng.choice(self.maker.changes).format("{}", self.other(self.here(place))), place))

    def replace(self) -> None:
        place = self.forward()
        now = self.here(place)
        like = [v for v in self.variables[-6:] if (v.rows, v.tokens, v.width) == (now.rows, now.tokens, now.width)]
        if like and self.rng.random() < 0.6:
            v = self.rng.choice(like)
            self.lines.append(Line(f"{{}} = {v.name}", place, rebinds=True))
            v.alias.points.add((self.invoke, place))
            self.bound[self.invoke, place] = v.alias
            return
        text = self.rng.choice(self.maker.replacements).replace("{1}", self.other(now))
        self.lines.append(Line(f"{{}} = {text}", place, rebinds=True))
        if text != "{}[:]":  # which is a view of what stood there
            self.bound[self.invoke, place] = _Alias((self.invoke, place))

    def resize(self) -> None:
        """Puts fewer tokens where the model takes them: before the head, or in what is added to the residual stream."""
        place = self.forward()
        if place == ("lm_head", "input") and place not in self.cut:
            tokens = self.rng.randint(1, self.tokens)
            self.cut[place] = self.cut["lm_head", "output"] = tokens
        elif place[0].endswith(".mlp") and place[1] == "output" and place not in self.cut:
            tokens = self.cut[place] = 1
        else:
            return
        self.lines.append(Line(f"{{}} = {{}}[:, -{tokens}:]", place, rebinds=True))

    def call(self) -> None:
        """A module of the model on a value."""
        modules = [p for p, port in self.maker.places if port == "output" and not p.split(".")[-1].isdigit()]
        modules = [p for p in modules if "drop" not in p and not p.endswith(ATTENTION) and p not in IDS]
        path = self.rng.choice(modules)
        fit = [v for v in self.variables if v.width == self.maker.widths[path, "input"]]
        if not fit:
            return self.read()
        v = self.rng.choice(fit)
        out = self.variable(self.maker.widths[path, "output"], _Alias(), v.tokens, v.rows)
        self.new(f"{written((path, 'x')).removesuffix('.x')}({v.name})", out)
        return None

    def outside(self) -> None:
        """A change of what the program found: a constant, or the random numbers to come."""
        width = self.rng.choice(sorted(set(self.maker.widths.values())))
        self.lines.append(Line(self.rng.choice([f"c{width}.mul_(0.9)", f"c{width} = c{width} + 0.1", "torch.rand(3)"])))
