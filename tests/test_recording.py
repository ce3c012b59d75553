"""Python and PyTorch on values of a trace, against the same lines on tensors."""

from __future__ import annotations

import copy
import io
import itertools
import operator
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import einops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.overrides import get_overridable_functions

import conformance
from conformance import Call, check, describe, difference
from nnsight_go import InputError, LanguageModel, NnsightError
from nnsight_go.recorder import Recorder, current
from references import gpt2, reference


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    directory = tmp_path_factory.mktemp("model")
    reference(gpt2(n_layer=1)).save_pretrained(directory)
    return LanguageModel(directory, tokenizer=False, dispatch=True)


def normal(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def recorder() -> Recorder:
    assert current.recorder is not None
    return current.recorder


def hold(model: LanguageModel, *calls: Call, recorded: bool | None = None) -> None:
    """Each call gives in a trace what it gives eagerly; ``recorded`` says whether without a value at its line."""
    outcomes = check(model, calls)
    for call, outcome in zip(calls, outcomes, strict=True):
        what = f"{call.function} of {describe(call.args)}"
        assert outcome is not None, f"eager refuses {what}"
        assert not outcome.error, f"{outcome.error}, {what}"
        assert not outcome.shape_error, f"{outcome.shape_error}, {what}"
        if recorded is not None:
            assert outcome.forced != recorded, what


def same(model: LanguageModel, function: Callable[..., Any], *args: Any, recorded: bool | None = True) -> None:
    hold(model, Call(function, args), recorded=recorded)


# ---- every method of Tensor ----

TENSORS = {
    "floats": normal(3, 4),
    "ints": torch.tensor([[1, 3, 2, 1], [2, 1, 1, 3], [3, 3, 2, 2]]),
    "square": normal(4, 4, seed=1),
    "bools": normal(3, 4, seed=2) > 0,
    "number": torch.tensor(1.5),
    "index": torch.tensor(2),
    "cube": normal(2, 3, 4, seed=3),
    "transposed": normal(4, 3, seed=4).T,
    "complex": torch.complex(normal(3, 4, seed=5), normal(3, 4, seed=6)),
    "one": normal(1, 1, seed=7),
}
_INDEX = torch.tensor([[0, 1, 2, 0]])
ARGUMENTS: list[tuple[Any, ...]] = [
    (), (2,), (0,), (-1,), (2.5,), (True,), (0, 1), (1, 0), ((3, 4),), (4, 3), (-1, 2), ((0,),),
    (normal(3, 4, seed=8),), (normal(4, seed=9),), (normal(4, 2, seed=10),), (TENSORS["ints"],), (torch.tensor(2),),
    (torch.tensor(2.5),),
    (0, _INDEX), (0, torch.tensor([0, 2])), (TENSORS["bools"],), (TENSORS["bools"], 1.0), (torch.float64,), ("cpu",),
    (normal(3, 4, seed=11), normal(3, 4, seed=12)), (0, _INDEX, normal(1, 4, seed=13)), (0, _INDEX, 2.0), (1, 1, 2),
    (-1, 1), (0, 0, 1), (None,), ([1, 2],), ([0, 1], [1, 0]), (2j,),
]  # fmt: skip

# Not compared: what has no value to compare, belongs to gradients, changes classes or the process, or
# (index) does not end. The sizes of the last three are not those that PyTorch's meta kernels give.
NOT_COMPARED = frozenset(
    """__setstate__ share_memory_ storage data_ptr untyped_storage storage_type backward register_hook
    register_post_accumulate_grad_hook retain_grad module_load const_data_ptr __reduce_ex__ __dlpack__ __deepcopy__
    cuda xpu ipu mtia record_stream pin_memory is_pinned __repr__ __format__ __cuda_array_interface__ as_subclass
    _make_subclass rename rename_ refine_names align_to align_as set_data map_ map2_ apply_ reinforce
    _clear_non_serializable_cached_data requires_grad_ _is_view set_ index to_mkldnn __rpow__ svd""".split()
)
METHODS = sorted(
    name
    for f in get_overridable_functions()[torch.Tensor]
    if not isinstance(f, property) and callable(getattr(torch.Tensor, name := getattr(f, "__name__", ""), None))
    if name not in NOT_COMPARED
)


@pytest.mark.parametrize("name", METHODS)
def test_method(name: str, model: LanguageModel) -> None:
    method = getattr(torch.Tensor, name)
    in_place = name.endswith("_") and not name.endswith("__")
    fills = not name.startswith(("new_empty", "empty", "resize"))
    tried = [Call(method, (t, *a), {}, fills, in_place) for t in TENSORS.values() for a in ARGUMENTS]
    random.Random(1).shuffle(tried)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls = list(itertools.islice(filter(_accepted, tried), 4))
    if not calls:
        pytest.skip("takes none of the arguments")
    hold(model, *calls)


def _accepted(call: Call) -> bool:
    try:
        return conformance.eager(call).result is not NotImplemented
    except Exception:
        return False


PROPERTIES = "H T mH mT real imag data shape dtype ndim layout itemsize nbytes is_sparse is_leaf requires_grad".split()


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name: str, model: LanguageModel) -> None:
    for t in TENSORS.values():
        if _accepted(Call(getattr, (t, name))):
            same(model, getattr, t, name)


# ---- operators and promotion of types ----

BINARY = [
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow,
    operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift, operator.matmul,
    operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, divmod,
]  # fmt: skip
IN_PLACE = [
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift,
]  # fmt: skip
OTHERS: list[Any] = [
    2, -3, 0.5, True, 1 + 2j, np.float32(1.5), np.float64(2.5), np.int64(3), np.array([1.0, 2.0, 3.0]),
    np.array([1, 2, 3]), torch.tensor(2), torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64), torch.tensor(True),
    torch.tensor([1, 2, 3]), torch.tensor([1.5, 2.5, 3.5], dtype=torch.float64),
]  # fmt: skip
DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@pytest.mark.parametrize("function", BINARY, ids=lambda f: f.__name__)
def test_operator(function: Callable[..., Any], model: LanguageModel) -> None:
    """Of all dtypes with all kinds of numbers on either side: numbers and dtypes are PyTorch's."""
    calls = []
    for dtype in DTYPES:
        t = torch.tensor([1, 2, 3]).to(dtype)
        for other in OTHERS:
            calls += [c for c in (Call(function, (t, other)), Call(function, (other, t))) if _accepted(c)]
    if function is operator.pow:  # PyTorch's kernel for meta tensors says int64 for bool ** bool
        calls = [c for c in calls if not all(getattr(x, "dtype", type(x)) in (torch.bool, bool) for x in c.args)]
    assert calls
    hold(model, *calls)


@pytest.mark.parametrize("function", IN_PLACE, ids=lambda f: f.__name__)
def test_in_place_operator(function: Callable[..., Any], model: LanguageModel) -> None:
    calls = []
    for dtype in DTYPES:
        t = torch.tensor([1, 2, 3]).to(dtype)
        calls += [c for other in OTHERS if _accepted(c := Call(function, (t, other), changes=True))]
    assert calls
    hold(model, *calls)


@pytest.mark.parametrize("function", [operator.neg, operator.pos, operator.abs, operator.inv, round], ids=str)
def test_unary_operator(function: Callable[..., Any], model: LanguageModel) -> None:
    hold(model, *[c for t in TENSORS.values() if _accepted(c := Call(function, (t,)))])


def test_operands_of_other_types(model: LanguageModel) -> None:
    with model.trace([0]):
        p = recorder().constant(normal(3))
        assert (p == "text") is False and (p != "text") is True and (p == None) is False  # noqa: E711
        for other in ("text", [1, 2], None, object()):
            for function in (operator.add, operator.sub, operator.pow, operator.lt):
                with pytest.raises(TypeError):
                    function(p, other)
                with pytest.raises(TypeError):
                    function(other, p)


# ---- indexing ----


@st.composite
def indices(draw: st.DrawFn, sizes: tuple[int, ...]) -> Any:
    """An index of a tensor: numbers, slices, lists, tensors of numbers and of bools, None and Ellipsis."""
    out: list[Any] = []
    axis, ellipsis = 0, False
    while axis < len(sizes) and (not out or draw(st.booleans())):
        n = sizes[axis]
        kind = draw(st.sampled_from(("int", "slice", "list", "tensor", "scalar", "mask", "none", "ellipsis", "array")))
        number = st.integers(-n, n - 1)
        many = st.lists(number, min_size=0 if kind == "tensor" else 1, max_size=3)
        match kind:
            case "int":
                out.append(draw(number))
            case "slice":
                bound = st.none() | st.integers(-n - 1, n + 1)
                out.append(slice(draw(bound), draw(bound), draw(st.none() | st.integers(1, 3))))
            case "list":
                out.append(draw(many))
            case "tensor":
                out.append(torch.tensor(draw(many), dtype=torch.int64))
            case "array":
                out.append(np.array(draw(many)))
            case "scalar":
                out.append(torch.tensor(draw(number)))
            case "mask":
                rows = draw(st.integers(1, len(sizes) - axis))
                shape = sizes[axis : axis + rows]
                bits = draw(st.lists(st.booleans(), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
                out.append(torch.tensor(bits).reshape(shape))
                axis += rows - 1
            case "none":
                out.append(None)
                axis -= 1
            case "ellipsis":
                if ellipsis:
                    continue
                ellipsis = True
                out.append(...)
                axis = max(axis, draw(st.integers(axis, len(sizes)))) - 1
        axis += 1
    return out[0] if len(out) == 1 and draw(st.booleans()) else tuple(out)


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[tuple[int, ...], Any, Any]]:
    """Sizes, an index of them, and a number or the dtype of what to set there."""
    found = []
    for _ in range(8):
        sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
        found.append((sizes, draw(indices(sizes)), draw(st.sampled_from((0, 1.5, True, "like", "row", "number")))))
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs())
def test_indexing(model: LanguageModel, program: list[tuple[tuple[int, ...], Any, Any]]) -> None:
    """Reading and setting parts, with proxies and with plain tensors in the index."""
    calls = []
    for sizes, index, value in program:
        t = torch.arange(float(np.prod(sizes))).reshape(sizes)
        if not _accepted(Call(_get, (t, index))):
            continue  # lists whose lengths do not fit each other
        for i in (index, _Plain(index)):
            calls.append(Call(_get, (t, i)))
        part = conformance.eager(Call(_get, (t, index)))
        what: Any = value
        if isinstance(value, str):
            like = -1 - part.result.clone()
            what = {"like": like, "row": like[:1] if like.dim() else like, "number": torch.tensor(-2.0)}[value]
        for i in (index, _Plain(index)):
            calls.append(Call(_set, (t, i, what), changes=True))
    hold(model, *[c for c in calls if _accepted(c)])


class _Plain:
    """An index whose tensors are given as they are, not as proxies."""

    def __init__(self, index: Any) -> None:
        self.index = index


def _get(t: torch.Tensor, index: Any) -> Any:
    return t[index.index if isinstance(index, _Plain) else index]


def _set(t: torch.Tensor, index: Any, value: Any) -> None:
    t[index.index if isinstance(index, _Plain) else index] = value


def test_writes_through_views(model: LanguageModel) -> None:
    def chain(t: torch.Tensor) -> Any:
        view = t[1:, :, ::2]
        row = view.transpose(0, 1)[2]
        row += 1
        view[0].mul_(3)
        t.view(-1)[::5] = -1
        t[t > 2] = 7
        t[..., torch.tensor([0, 1])] *= 2
        return view, row

    same(model, chain, normal(3, 4, 5))


# ---- tensors out of proxies ----


def test_new_tensors(model: LanguageModel) -> None:
    a, b, i = torch.tensor(1.5), torch.tensor(2.5, dtype=torch.float64), torch.tensor(3)
    v = normal(3)
    same(model, lambda x, y: torch.tensor([x, y, 1]), a, b)
    same(model, lambda x, y: torch.tensor([[x, 2.0], [y, True]]), a, i)
    same(model, lambda x: torch.tensor([x, 2]), i)
    same(model, lambda x: torch.tensor([x, 2.5]), i)
    same(model, lambda x: torch.tensor([x, x], dtype=torch.int32), i)
    same(model, lambda x: torch.tensor(x, dtype=torch.float64), v)
    same(model, lambda x: torch.tensor(x), v)
    same(model, lambda x: torch.as_tensor(x), v)
    same(model, lambda x: torch.as_tensor(x, dtype=torch.float16), v)
    same(model, lambda x: torch.asarray(x, copy=True), v)
    same(model, lambda x: x.new_tensor([1, 2]), v)
    same(model, lambda x, y: torch.stack([x, y]), a, a + 1)
    same(model, lambda x, y: torch.stack((x, y), dim=-1), v, v + 1)
    same(model, lambda x: torch.cat([x, torch.ones(2), x]), v)
    same(model, lambda x: torch.full_like(x, 2), v)
    same(model, lambda x: torch.zeros(x, 3), i, recorded=None)
    same(model, lambda x: torch.arange(x), i, recorded=None)
    same(model, lambda x, y: torch.linspace(x, y, 5), a, a + 1)
    same(model, lambda x: torch.zeros(x.shape[0], len(x)).add(x), v)
    same(model, lambda x, n: x.expand(n, -1), v, i, recorded=None)


def test_out(model: LanguageModel) -> None:
    t = normal(3, 4)
    hold(
        model,
        Call(torch.add, (t, 1), {"out": torch.zeros(3, 4)}, changes=True),
        Call(torch.mul, (t, t), {"out": torch.zeros(0)}, changes=True),
        Call(torch.sum, (t, 1), {"out": torch.zeros(3)}, changes=True),
        Call(torch.max, (t, 1), {"out": (torch.zeros(3), torch.zeros(3, dtype=torch.int64))}, changes=True),
        Call(torch.nonzero, (t > 0,), {"out": torch.zeros(0, dtype=torch.int64)}, changes=True),
        Call(torch.matmul, (t, t.T), {"out": torch.zeros(3, 3, dtype=torch.float64)[:, ::1].float()}, changes=True),
    )


def test_default_dtype_and_device(model: LanguageModel) -> None:
    def halves(t: torch.Tensor) -> Any:
        before = t / 2
        torch.set_default_dtype(torch.float64)
        try:
            inside = t / 2, t * 0.5, torch.tensor([t[0], 0.5]), t.sqrt()
        finally:
            torch.set_default_dtype(torch.float32)
        return before, inside, t / 2

    same(model, halves, torch.tensor([1, 2, 3]), recorded=None)

    def on_device(t: torch.Tensor) -> Any:
        with torch.device("cpu"):
            return t + torch.ones(3), torch.tensor([t[0], 1.0]), torch.zeros_like(t), torch.full((2,), 1.0) * t[0]

    same(model, on_device, normal(3))


def test_autocast(model: LanguageModel) -> None:
    def mixed(t: torch.Tensor, w: torch.Tensor) -> Any:
        before = t @ w
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = t @ w
            return before, y, F.softmax(y, -1), y + 1, F.linear(t, w.T), torch.einsum("ij,jk->ik", t, w), before @ w.T

    same(model, mixed, normal(3, 4), normal(4, 5), recorded=None)


# ---- plain Python ----


def test_iteration_and_unpacking(model: LanguageModel) -> None:
    t = normal(3, 4)
    same(model, lambda x: [row * i for i, row in enumerate(x)], t)
    same(model, lambda x: dict(zip("abc", x, strict=True)), t)

    def unpacked(x: torch.Tensor) -> Any:
        first, *others = x
        a, b, c, d = first
        return first, others, a + b * c - d

    same(model, unpacked, t)
    same(model, lambda x: list(reversed(x)), t)
    same(model, lambda x: sum(x), t)
    same(model, lambda x: [len(x), x.size(), x.size(-1), x.shape[0] * 2, x.numel(), x.dim(), x.stride()], t)
    same(model, lambda x: x.split([1, 2]) + x.chunk(2, 1) + x.unbind(1), t)
    same(model, lambda x: max(x.flatten(), key=lambda v: float(v)), t, recorded=False)


def test_values_on_demand(model: LanguageModel) -> None:
    t = torch.tensor([0.5, 2.0, 1.0])
    for function in (
        lambda x: 2.0 in x,
        lambda x: bool(0 < x[0] < 1),
        lambda x: 0 < x[0] < 3 < x.sum(),
        lambda x: "big" if x.max() > 1 else "small",
        lambda x: x.tolist(),
        lambda x: [float(x[0]), int(x[1]), complex(x[2]), bool(x[0])],
        lambda x: f"{x[0]:.3f}",
        lambda x: x.numpy(),
        lambda x: np.asarray(x) + 1,
        lambda x: np.sqrt(x.numpy()).tolist(),
        lambda x: list(range(int(x[1]))),
        lambda x: ["a", "b", "c"][x.argmax()],
        lambda x: x.equal(x + 0),
        lambda x: torch.allclose(x, x * 1),
        lambda x: x[x > 0.7].shape,
        lambda x: sorted(x, key=float),
        lambda x: x.item() if x.numel() == 1 else x.sum().item(),
    ):
        same(model, function, t, recorded=False)


def test_copies(model: LanguageModel) -> None:
    def copied(x: torch.Tensor) -> Any:
        deep, shallow = copy.deepcopy(x), copy.copy(x)
        x += 1
        return deep, shallow, x

    same(model, copied, normal(3))
    same(model, lambda x: copy.deepcopy({"a": [x, x + 1]}), normal(3))


def test_pickling_tells_what_to_do(model: LanguageModel) -> None:
    with model.trace([0]):
        p = model.transformer.h[0].output[0]
        for store in (lambda: torch.save(p, io.BytesIO()), lambda: pickle.dumps([p])):
            with pytest.raises(TypeError, match="save it, and pickle it after the block"):
                store()


def test_types(model: LanguageModel) -> None:
    with model.trace([0]):
        p = model.transformer.h[0].output[0]
        assert isinstance(p, torch.Tensor) and torch.is_tensor(p) and not isinstance(p, nn.Parameter)
        assert torch.is_floating_point(p) and not p.is_complex() and p.is_cpu and not p.is_cuda and not p.is_meta
        assert hash(p) == hash(p) and p in {p} and {p: 1}[p] == 1
        assert p.dtype is torch.float32 and p.device == torch.device("cpu") and p.get_device() == -1
        assert torch.result_type(p, 1.0) is torch.float32 and torch.can_cast(p.dtype, torch.float64)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: einops.rearrange(x, "b s (h d) -> b h s d", h=2),
        lambda x: einops.reduce(x, "b s d -> b d", "mean"),
        lambda x: einops.reduce(x, "b (s two) d -> b s d", "max", two=3),
        lambda x: einops.repeat(x, "b s d -> b s d n", n=2),
        lambda x: einops.einsum(x, x, "b s d, b t d -> b s t"),
        lambda x: einops.pack([x, x], "b * d"),
        lambda x: einops.rearrange([x, x + 1], "n b s d -> (n b) s d"),
        lambda x: torch.einsum("bsd,btd->bst", x, x),
        lambda x: torch.einsum(x, [0, 1, 2], [0, 2]),
    ],
)
def test_einops(function: Callable[..., Any], model: LanguageModel) -> None:
    same(model, function, normal(2, 3, 4))


# ---- random numbers ----


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.randn_like(x),
        lambda x: torch.rand_like(x, dtype=torch.float64),
        lambda x: torch.randint_like(x, 3, 9),
        lambda x: x + torch.randn(3, 4) + torch.rand(4),
        lambda x: (x.clone().normal_(), x.clone().uniform_(-1, 1), x.clone().exponential_()),
        lambda x: F.dropout(x, 0.4) + F.dropout(x, 0.2),
        lambda x: F.dropout(x.clone(), 0.4, inplace=True),
        lambda x: F.dropout(x, 0.4, training=False),
        lambda x: nn.init.xavier_uniform_(x.clone()),
        lambda x: F.gumbel_softmax(x, hard=True),
    ],
)
def test_draws_are_recorded(function: Callable[..., Any], model: LanguageModel) -> None:
    hold(model, Call(function, (normal(3, 4),)), Call(function, (normal(3, 4, seed=1),)), recorded=True)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.multinomial(x.softmax(-1), 2),
        lambda x: torch.bernoulli(x.sigmoid()),
        lambda x: torch.normal(x, 1.0),
        lambda x: torch.poisson(x.exp()),
        lambda x: torch.distributions.Categorical(logits=x).sample(),
        lambda x: torch.distributions.Normal(x, 1.0).rsample(),
        lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.3),
    ],
)
def test_draws(function: Callable[..., Any], model: LanguageModel) -> None:
    hold(model, Call(function, (normal(3, 4),)), Call(function, (normal(3, 4, seed=1),)))


def test_seed_in_the_block(model: LanguageModel) -> None:
    def seeded(x: torch.Tensor) -> Any:
        torch.manual_seed(5)
        a = torch.randn_like(x)
        torch.manual_seed(5)
        return a, torch.randn_like(x), torch.rand(2)

    same(model, seeded, normal(3))


# ---- modules ----


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.register_buffer("seen", torch.zeros(16))
        self.threshold = nn.Parameter(torch.tensor(0.1))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        hidden = F.relu(self.encoder(x))
        hidden = torch.where(hidden > self.threshold, hidden, 0.0)
        return self.decoder(hidden), hidden


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[torch.Tensor, ...]]] = {
    "Linear": (lambda: nn.Linear(8, 3), (normal(2, 5, 8),)),
    "Embedding": (lambda: nn.Embedding(9, 4, padding_idx=0), (torch.tensor([[0, 3], [8, 1]]),)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(9, 4), (torch.tensor([[0, 3], [8, 1]]),)),
    "Conv1d": (lambda: nn.Conv1d(5, 4, 3, padding="same"), (normal(2, 5, 8),)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="circular"), (normal(2, 3, 8, 8),)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), (normal(2, 3, 4, 4),)),
    "LayerNorm": (lambda: nn.LayerNorm(8), (normal(2, 5, 8),)),
    "RMSNorm": (lambda: nn.RMSNorm(8), (normal(2, 5, 8),)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (normal(2, 4, 8),)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(8), (normal(6, 8),)),
    "BatchNorm1d momentum": (lambda: nn.BatchNorm1d(8, momentum=None), (normal(6, 8),)),
    "BatchNorm1d eval": (lambda: nn.BatchNorm1d(8).eval(), (normal(6, 8),)),
    "BatchNorm1d alone": (lambda: nn.BatchNorm1d(8, track_running_stats=False), (normal(6, 8),)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, track_running_stats=True), (normal(2, 4, 8),)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (normal(2, 5, 8),) * 3),
    "MultiheadAttention eval": (lambda: nn.MultiheadAttention(8, 2, batch_first=True).eval(), (normal(2, 5, 8),) * 3),
    "LSTM": (lambda: nn.LSTM(8, 6, num_layers=2, batch_first=True), (normal(2, 5, 8),)),
    "LSTM dropout": (lambda: nn.LSTM(8, 6, num_layers=2, dropout=0.3), (normal(2, 5, 8),)),
    "GRU": (lambda: nn.GRU(8, 6, bidirectional=True), (normal(2, 5, 8),)),
    "RNN": (lambda: nn.RNN(8, 6), (normal(2, 5, 8),)),
    "LSTMCell": (lambda: nn.LSTMCell(8, 6), (normal(2, 8),)),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (normal(2, 5, 8),)),
    "TransformerEncoderLayer eval": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(),
        (normal(2, 5, 8),),
    ),
    "Dropout": (lambda: nn.Dropout(0.5), (normal(2, 5, 8),)),
    "Dropout2d": (lambda: nn.Dropout2d(0.5), (normal(2, 5, 8, 8),)),
    "AlphaDropout": (lambda: nn.AlphaDropout(0.5), (normal(2, 5, 8),)),
    "PReLU": (lambda: nn.PReLU(), (normal(2, 5),)),
    "Sequential": (lambda: nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Flatten(), nn.Softmax(-1)), (normal(2, 5, 8),)),
    "MaxPool2d": (lambda: nn.MaxPool2d(2, return_indices=True), (normal(2, 3, 8, 8),)),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(2), (normal(2, 3, 8, 8),)),
    "Upsample": (lambda: nn.Upsample(scale_factor=2.0, mode="bilinear"), (normal(2, 3, 4, 4),)),
    "CrossEntropyLoss": (lambda: nn.CrossEntropyLoss(label_smoothing=0.1), (normal(4, 3), torch.tensor([0, 2, 1, 1]))),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3)), (normal(2, 8),)),
    "Autoencoder": (lambda: Autoencoder(), (normal(2, 5, 8),)),
}


@pytest.mark.parametrize("name", MODULES)
def test_module(name: str, model: LanguageModel) -> None:
    """A module of the user's own gives the same, and changes its own state as much, once."""
    make, args = MODULES[name]
    torch.manual_seed(0)
    eager = make()
    traced = copy.deepcopy(eager)
    torch.manual_seed(1)
    want = eager(*args)
    with model.trace([0]):
        torch.manual_seed(1)
        got = traced(*[recorder().constant(a).clone() for a in args])
        result = [got]
        result.save()
    assert not (error := difference(_bare(result[0]), _bare(want))), error
    for (key, mine), theirs in zip(traced.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=f"{key} after the call")
    assert getattr(traced, "calls", 1) == 1


def _bare(x: Any) -> Any:
    return conformance.tree_map(lambda t: t.detach(), x)


# ---- what is not a call that a proxy sees ----


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: torch.func.grad(lambda a: (a @ w).pow(2).sum())(x),
        lambda x, w: torch.func.grad_and_value(lambda a: (a @ w).pow(2).sum())(x),
        lambda x, w: torch.func.vmap(lambda row: row @ w)(x),
        lambda x, w: torch.vmap(lambda row: (row * 2, row.sum()), in_dims=1)(x),
        lambda x, w: torch.func.vmap(torch.func.grad(lambda row: (row @ w).sin().sum()))(x),
        lambda x, w: torch.func.jacrev(lambda a: (a @ w).sin())(x),
        lambda x, w: torch.func.jacfwd(lambda a: (a @ w).sin())(x),
        lambda x, w: torch.func.hessian(lambda a: (a @ w).sin().sum())(x),
        lambda x, w: torch.func.jvp(lambda a: (a @ w).sin(), (x,), (x,)),
        lambda x, w: torch.func.vjp(lambda a: (a @ w).sin(), x)[1](torch.ones(3, 2)),
        lambda x, w: torch.func.functional_call(nn.Linear(4, 2), {"weight": w.T, "bias": torch.zeros(2)}, x),
        lambda x, w: torch.func.grad(lambda a: (torch.ones(2) @ (x @ w).T * a).sum())(torch.ones(3)),
    ],
)
def test_transforms(function: Callable[..., Any], model: LanguageModel) -> None:
    hold(model, Call(function, (normal(3, 4), normal(4, 2))))


def test_scripted(model: LanguageModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(_scripted)
        traced = torch.jit.trace(lambda x: x.sin() + 1, torch.ones(3))
        module = torch.jit.script(nn.Linear(3, 2))
    same(model, scripted, normal(3), recorded=False)
    same(model, traced, normal(3), recorded=False)
    same(model, lambda x: module(x).detach(), normal(3), recorded=False)


def _scripted(x: torch.Tensor) -> torch.Tensor:
    if bool(x.sum() > 0):
        return x * 2
    return x - 1


def test_calls_from_cpp_are_refused(model: LanguageModel) -> None:
    """C++ that is handed a proxy without torch's Python API fails, rather than computing on nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.jit.script(_scripted).graph
    with model.trace([0]):
        p = recorder().constant(normal(3)).clone()
        with pytest.raises(RuntimeError):
            torch._C._jit_interpret_graph(graph, (p,))
        with torch._C.DisableTorchFunction(), pytest.raises(InputError, match="called from C\\+\\+"):
            torch.add(p, 1)


def test_compiled(model: LanguageModel) -> None:
    compiled = torch.compile(lambda x: (x.sin() + 1).sum(-1), backend="eager")
    compiled(normal(3, 4))
    same(model, compiled, normal(3, 4))
    module = torch.compile(nn.Linear(4, 2), backend="eager")
    same(model, lambda x: module(x), normal(3, 4))
    from torch._dynamo.eval_frame import _stance

    assert _stance.stance == "default", "the block has ended"


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x * scale

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * 2 * ctx.saved_tensors[0], None


def test_custom_function(model: LanguageModel) -> None:
    same(model, lambda x: Squared.apply(x, 3.0) + 1, normal(3), recorded=False)  # since it has its own backward
    with torch.no_grad():
        same(model, lambda x: Squared.apply(x, 3.0) + 1, normal(3))


def test_operators_by_name(model: LanguageModel) -> None:
    ops = torch.ops.aten
    same(model, lambda x: ops.add(x, 1), normal(3))
    same(model, lambda x: ops.add.Tensor(x, x, alpha=2), normal(3))
    same(model, lambda x: ops.topk.default(x, 2), normal(3))
    same(model, lambda x: ops.split.Tensor(x, 2), normal(5))
    hold(model, Call(lambda x: ops.mul_.Tensor(x, 2), (normal(3),), changes=True), recorded=True)


def test_custom_operator(model: LanguageModel) -> None:
    @torch.library.custom_op("nnsight_go_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(x.numpy() * 2)

    same(model, twice, normal(3), recorded=False)


# ---- tensors from outside ----


def test_outside_tensors_change_once(model: LanguageModel) -> None:
    total, rows, store = torch.zeros(3), torch.zeros(2, 3), torch.ones(3)
    with model.trace([0]):
        p = recorder().constant(normal(3)).clone()
        total += p
        total.add_(p, alpha=2)
        rows[1] = p
        torch.mul(p, 2, out=store)
        seen = (p + total).save()
    want = normal(3)
    torch.testing.assert_close(total, 3 * want)
    torch.testing.assert_close(rows, torch.stack([torch.zeros(3), want]))
    torch.testing.assert_close(store, 2 * want)
    torch.testing.assert_close(seen, 4 * want)


def test_computed_calls_change_the_graph(model: LanguageModel) -> None:
    """What no rule can record still changes its arguments, and gives views of them."""

    def mixed(x: torch.Tensor) -> Any:
        parts = torch.tensor_split(x, torch.tensor([1, 3]))
        parts[1].mul_(2)
        torch._foreach_add_([x, parts[0]], 1)
        with torch.no_grad():
            x.bernoulli_(x.sigmoid())
        return parts, x + 1

    same(model, mixed, normal(5), recorded=False)


def test_sizes_that_change_in_place(model: LanguageModel) -> None:
    def reshaped(x: torch.Tensor) -> Any:
        before, other = x.sum(0), x * 2
        x.t_()
        wide = x[0]
        x.unsqueeze_(0).squeeze_(0)
        x.resize_(2, 2)
        return before, other, wide, x, x.shape, other.shape

    same(model, reshaped, normal(2, 3))


def test_what_only_real_tensors_have(model: LanguageModel) -> None:
    with model.trace([0]):
        p = recorder().constant(normal(3)).clone()
        for use in (lambda: p.register_post_accumulate_grad_hook(print), lambda: p.grad_fn):
            with pytest.raises(NnsightError, match="not available inside a trace"):
                use()
