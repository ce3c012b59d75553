"""The engine's own operators (``nng::linear``, ``nng::gelu``) are torch's for whatever is more than numbers in memory.

What they compute, and for which sizes, is tested beside them (``engine/aten``).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.functional import gelu, linear

from nnsight_go import _ffi
from references import close

X, W, B = torch.randn(3, 64), torch.randn(40, 64), torch.randn(40)
PAIRS = {  # the engine's, and torch's
    "linear": (lambda x, w, b: torch.ops.nng.linear(x, w, b), linear),
    "transposed": (lambda x, w, b: torch.ops.nng.linear(x, w.t(), b, True), linear),
    "gelu": (
        lambda x, w, b: torch.ops.nng.gelu(x + w[0] * b[0], approximate="tanh"),
        lambda x, w, b: gelu(x + w[0] * b[0], approximate="tanh"),
    ),
}
Operator = Callable[..., torch.Tensor]


@pytest.fixture(autouse=True, scope="module")
def operators() -> None:
    """The engine brings them along."""
    _ffi.counters()


@pytest.fixture(params=list(PAIRS))
def both(request: pytest.FixtureRequest) -> tuple[Operator, Operator]:
    return PAIRS[request.param]


@pytest.mark.parametrize("of", [0, 1, 2])
@pytest.mark.parametrize("followed", [False, True])
def test_tangents(both: tuple[Operator, Operator], of: int, followed: bool) -> None:
    tangents = []
    for operator in both:
        args = [X.clone().requires_grad_(followed), W, B]
        with forward_ad.dual_level():
            args[of] = forward_ad.make_dual(args[of], torch.ones_like(args[of]))
            tangents.append(forward_ad.unpack_dual(operator(*args)).tangent)
    close(tangents[0].detach(), tangents[1].detach())


def test_tangents_of_gradients(both: tuple[Operator, Operator]) -> None:
    tangents = []
    for operator in both:
        x = X.clone().requires_grad_()
        with forward_ad.dual_level():
            y = operator(x, W, B)
            seed = forward_ad.make_dual(torch.ones_like(y), torch.full_like(y, 0.5))
            tangents.append(forward_ad.unpack_dual(torch.autograd.grad(y, x, seed)[0]).tangent)
    close(tangents[0].detach(), tangents[1].detach())


def test_zeros_that_have_no_memory(both: tuple[Operator, Operator]) -> None:
    ours, theirs = (operator(torch._efficientzerotensor((3, 64)), W, B) for operator in both)
    close(ours + 0, theirs + 0)


def test_rows_of_different_lengths() -> None:
    ragged = torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged)
    ours, theirs = torch.ops.nng.linear(ragged, W, B), linear(ragged, W, B)
    for one, other in zip(ours.unbind(), theirs.unbind(), strict=True):
        close(one, other)


def test_vectorized(both: tuple[Operator, Operator]) -> None:
    many = torch.randn(4, 3, 64)
    ours, theirs = (torch.vmap(lambda x, of=operator: of(x, W, B))(many) for operator in both)
    close(ours, theirs)
    ours, theirs = (torch.func.jacfwd(lambda x, of=operator: of(x, W, B))(X[0]) for operator in both)
    close(ours, theirs)
