"""REx against its recursion."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lilliput.methods.weight import rex, rtn
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.rows import RowsPart
from lilliput.stats.site import SiteStats
from lilliput.target import Target


def _weight(rows: int = 20, width: int = 48) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0)) * 0.05


def _stats(width: int = 48) -> SiteStats:
    return SiteStats(width, 10, square=torch.rand(width, generator=torch.Generator().manual_seed(1)) * 10)


def _target(bits: int = 3, group: int | str = "channel") -> Target:
    return Target(bits=bits, group_size=group, scale_dtype="float32")


def test_one_term_is_round_to_nearest() -> None:
    w, stats = _weight(), _stats()
    for search, importance in itertools.product(("minmax", "mse"), (False, True)):
        o = rex.Options.model_validate({"terms": 1, "search": search, "importance": importance})
        ours = rex.compress(Layer("x", w), stats, _target(group=16), o)
        theirs = rtn.compress(
            Layer("x", w),
            stats,
            _target(group=16),
            rtn.Options.model_validate({"search": search, "importance": importance}),
        )
        assert torch.equal(ours.decode(), theirs.decode())
        assert len(ours.parts) == 1


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_terms_are_those_of_the_recursion_and_the_bound_shrinks(bits: int) -> None:
    """Symmetric min-max: |rest| <= S / 2 and the next S is max|rest| / (2^(b-1) - 1)."""
    w = _weight()
    top = (1 << (bits - 1)) - 1
    rest, bound = w.double(), w.abs().amax(1, keepdim=True).double()
    for terms in range(1, 5):
        step = rest.abs().amax(1, keepdim=True) / top
        rest = rest - torch.round(rest / step).clamp(-top - 1, top) * step
        bound = bound / (2 * top)
        o = rex.Options(terms=terms, search="minmax", importance=False)
        layer = rex.compress(Layer("x", w), _stats(), _target(bits), o)
        miss = (w - layer.decode()).double()
        torch.testing.assert_close(miss.abs(), rest.abs(), rtol=0, atol=1e-6)  # a tie may go either way
        assert bool((miss.abs() <= bound * (1 + 1e-4) + 1e-8).all())


@pytest.mark.parametrize("importance", [True, False])
def test_the_sparse_variant_holds_the_rows_of_largest_rest(importance: bool) -> None:
    w, stats = _weight(), _stats()
    o = rex.Options(terms=3, share=0.25, importance=importance)
    layer = rex.compress(Layer("x", w), stats, _target(), o)
    before = Layer("x", w)
    for n, part in enumerate(layer.parts):
        if n:
            assert isinstance(part, RowsPart)
            missed = before.rest().double().square() * (stats.second_moment() if importance else 1.0)
            assert sorted(missed.sum(1).topk(5).indices.tolist()) == part.index.tolist()
            assert isinstance(part.inner, QuantizedPart)
        before = before.with_part(part)
    assert before.rest().square().sum() < (w - layer.parts[0].decode()).square().sum()


def test_shares_of_nothing_and_everything() -> None:
    w, stats = _weight(), _stats()
    one = rex.compress(Layer("x", w), stats, _target(), rex.Options(terms=1)).decode()
    assert torch.equal(rex.compress(Layer("x", w), stats, _target(), rex.Options(share=0.0)).decode(), one)
    whole = Target(bits=4, group_size="tensor")
    few = rex.compress(Layer("x", w), stats, whole, rex.Options(share=0.001))  # of which no output gets any
    assert torch.equal(few.decode(), rex.compress(Layer("x", w), stats, whole, rex.Options(terms=1)).decode())
    both = rex.compress(Layer("x", w), stats, _target(), rex.Options()).rest()
    assert float(both.norm()) < 0.3 * float((w - one).norm())


def test_needs_and_sizes() -> None:
    assert rex.needs(rex.Options(importance=False)) == ()
    assert rex.needs(rex.Options()) == ("square",)
    made = rex.scheme(Target(bits=4, group_size=16), rex.Options(terms=3, share=0.1), 20, 48)
    assert made.size_bits(20, 48) == (20 * 48 * 4 + 20 * 3 * 16) + 2 * (2 * 48 * 4 + 2 * 3 * 16 + 2 * 32)
