"""LoftQ's alternation against its equations in float64, and the starts that it gives to a fine-tuning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.algebra import lowrank
from lilliput.errors import PlanError
from lilliput.formats.known import from_target
from lilliput.methods.weight import gptq
from lilliput.methods.weight.loftq import Options, compress, needs, scheme
from lilliput.parts.layer import Layer
from lilliput.parts.lowrank import LowRankPart, approximate, factor_spec
from lilliput.parts.scheme import of
from lilliput.stats.site import SiteStats
from lilliput.target import Target


def case(rows: int = 24, width: int = 40) -> tuple[Tensor, SiteStats]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, width, generator=g) @ torch.randn(width, width, generator=g)
    x = x * torch.exp(torch.randn(width, generator=g)) / width**0.5
    return torch.randn(rows, width, generator=g), SiteStats(width, 300, gram=x.T @ x)


def target(rank: int = 6, bits: int = 2) -> Target:
    return Target(bits=bits, group_size=16, rank=rank, symmetric=False, scale_dtype="float32")


def nearest(w: Tensor, bits: int) -> Tensor:
    """Min-max round to nearest in groups of 16, one group at a time."""
    out = torch.empty_like(w)
    for i in range(len(w)):
        for a in range(0, w.shape[1], 16):
            some = w[i, a : a + 16]
            low, high = min(0.0, float(some.min())), max(0.0, float(some.max()))
            step = (high - low) / (2**bits - 1)
            zero = round(-low / step)
            out[i, a : a + 16] = ((some / step).round() + zero).clamp(0, 2**bits - 1).sub(zero) * step
    return out


def reference(w: Tensor, rank: int, bits: int, turns: int) -> list[Tensor]:
    """Q_t + P_t for t = 1 .. turns: Q_t = q(W - P), P = SVD_r(W - Q_t)."""
    w, product, found = w.double(), torch.zeros(w.shape, dtype=torch.float64), []
    for _ in range(turns):
        codes = nearest(w - product, bits)
        u, s, vt = torch.linalg.svd(w - codes, full_matrices=False)
        product = (u[:, :rank] * s[:rank]) @ vt[:rank]
        found.append(codes + product)
    return found


def run(w: Tensor, stats: SiteStats, wanted: Target, **options: Any) -> Layer:
    return compress(Layer("x", w), stats, wanted, Options(**{"factors": "float32", "weighting": "none", **options}))


@pytest.mark.parametrize("turns", [1, 3])
def test_the_turns_are_those_of_the_paper(turns: int) -> None:
    w, stats = case()
    every = reference(w, 6, 2, turns)
    best = min(every, key=lambda x: float((w - x).norm()))
    out = run(w, stats, target(), turns=turns).decode().double()
    # A weight at the border of two codes may fall to either side in another precision.
    assert float((out - best).norm()) < 0.02 * float((w - best).norm()) + 1e-4


def test_one_turn_is_the_svd_of_the_quantization_error() -> None:
    w, stats = case()
    form = from_target(target())
    grid = form.fit(w)
    rest = w - form.decode(form.encode(w, grid), grid)
    out = run(w, stats, target(), turns=1)
    assert torch.equal(out.parts[1].decode(), approximate(rest, 6, factor_spec("float32")).decode())


@pytest.mark.parametrize("weighting", ["none", "gram"])
@pytest.mark.parametrize("solver", ["nearest", "gptq"])
def test_turns_and_ranks_never_make_it_worse(weighting: str, solver: str) -> None:
    w, stats = case()
    metric = stats.gram if weighting == "gram" else None

    def error(rank: int, turns: int) -> float:
        out = run(w, stats, target(rank), turns=turns, weighting=weighting, solver=solver)
        return lowrank.squared(w - out.decode(), metric)

    by_turns = [error(6, t) for t in (1, 2, 4, 8)]
    assert by_turns == sorted(by_turns, reverse=True)
    by_rank = [error(r, 1) for r in (1, 4, 12, 23)]
    assert by_rank == sorted(by_rank, reverse=True)


def test_joint_fitting_under_the_output_error_beats_gptq_and_its_correction() -> None:
    w, stats = case()
    base = gptq.compress(Layer("x", w), stats, target(), gptq.Options())
    corrected = base.with_part(approximate(base.rest(), 6, factor_spec("float32"), stats.gram))
    joint = run(w, stats, target(), weighting="gram", solver="gptq", turns=4)
    errors = [lowrank.squared(w - x.decode(), stats.gram) for x in (joint, corrected, base)]
    assert errors[0] < 0.98 * errors[1]
    assert errors[1] < errors[2]


def test_no_turns_leave_the_quantized_model_and_a_factor_to_train() -> None:
    w, stats = case()
    form = from_target(target())
    grid = form.fit(w)
    out = run(w, stats, target(), turns=0)
    _, product = out.parts
    assert isinstance(product, LowRankPart)
    assert torch.equal(out.decode(), form.decode(form.encode(w, grid), grid))
    assert not bool(product.left.decode().any())
    drawn = product.right.decode()
    assert float(drawn.std()) == pytest.approx(40**-0.5, rel=0.15)
    again, other = (
        compress(Layer(n, w), stats, target(), Options(turns=0, factors="float32", seed=s)).parts[1]
        for n, s in (("x", 0), ("y", 0))
    )
    assert isinstance(again, LowRankPart)
    assert isinstance(other, LowRankPart)
    assert torch.equal(again.right.decode(), drawn)
    assert not torch.equal(other.right.decode(), drawn)


def test_sizes_and_needs_are_known_before() -> None:
    w, stats = case()
    options = Options(weighting="none")
    out = compress(Layer("x", w), stats, target(4, 3), options)
    planned = scheme(target(4, 3), options, 24, 40)
    assert of(out) == planned
    assert sum(p.bits() for p in out.parts) == planned.size_bits(24, 40)
    assert needs(options) == ()
    assert needs(Options(solver="gptq", weighting="none")) == needs(Options()) == ("gram",)
    with pytest.raises(PlanError, match="solver gptq has no format 'sign'"):
        scheme(target().model_copy(update={"format": "sign"}), Options(solver="gptq"), 24, 40)
    with pytest.raises(PlanError, match=r"target\.bits"):
        scheme(Target(rank=4, group_size=16), options, 24, 40)
    with pytest.raises(PlanError, match="give 1 to 24"):
        scheme(target(25), options, 24, 40)
