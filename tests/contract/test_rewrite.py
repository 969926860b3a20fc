"""What every method that rewrites a block owes its callers: the block computes what it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput import methods
from lilliput.errors import PlanError
from lilliput.folds.kinds import ScaleFold
from lilliput.methods.weight import gptq, rtn
from lilliput.parts.layer import Layer
from lilliput.stats import fold
from lilliput.target import Target
from lilliput.verbs.view import BlockIO, BlockView

REWRITE = sorted(n for n, m in methods.discover().items() if m.spec.verb == "rewrite" and m.spec.moves == "scales")
READING = [n for n in REWRITE if methods.get(n).spec.needs]
TARGET = Target(bits=3, group_size=16, symmetric=False)


def _rewrite(name: str, view: BlockView, io: BlockIO, target: Target = TARGET, **options: Any) -> Sequence[ScaleFold]:
    method = methods.get(name)
    folds = method.spec.run(view, io, target, method.parse(options))
    assert all(isinstance(f, ScaleFold) for f in folds)
    return list(folds)


def _apply(tensors: dict[str, Tensor], folds: Sequence[ScaleFold]) -> dict[str, Tensor]:
    """Producer rows divided, reader columns multiplied: straight from what a fold promises."""
    out = {n: t.clone() for n, t in tensors.items()}
    for f in folds:
        rows = torch.ones(out[f.link.producer].shape[0])
        rows[f.link.index] = f.scale
        out[f.link.producer] /= rows if f.link.kind == "norm" else rows[:, None]
        for reader in f.link.readers:
            out[reader] *= f.scale
    return out


@pytest.mark.parametrize("name", REWRITE)
def test_the_block_computes_what_it_did(name: str, toy: Any) -> None:
    """To 1e-5 of the output's largest value."""
    tensors = {n: t.clone() for n, t in toy.tensors.items()}
    folds = _rewrite(name, toy.view(), toy.io())
    assert folds
    assert all(torch.equal(toy.tensors[n], t) for n, t in tensors.items())
    x = torch.randn(50, 48, generator=torch.Generator().manual_seed(5))
    before, after = toy.forward(tensors, x), toy.forward(_apply(tensors, folds), x)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))


@pytest.mark.parametrize("name", REWRITE)
def test_scales_are_positive_shared_where_rows_are_shared_and_repeatable(name: str, toy: Any) -> None:
    folds, again = (_rewrite(name, toy.view(), toy.io(), **_everywhere(name)) for _ in range(2))
    assert {f.link.kind for f in folds} == ({"norm", "linear"} if name in READING else {"norm"})
    for f, g in zip(folds, again, strict=True):
        assert torch.equal(f.scale, g.scale)
        assert f.scale.dtype == torch.float32
        assert bool(((f.scale > 0) & torch.isfinite(f.scale)).all())
        assert torch.equal(f.scale, f.link.tie(f.scale))


def _everywhere(name: str) -> dict[str, Any]:
    return {"links": "all"} if name in ("smoothquant", "os-plus") else {}


@pytest.mark.parametrize("name", READING)
def test_a_site_without_tokens_is_left_alone(name: str, toy: Any) -> None:
    empty = BlockIO({s.name: fold.init(s.width, fold.NAMES) for s in toy.block.sites})
    assert _rewrite(name, toy.view(), empty) == []
    assert _rewrite(name, toy.view(), BlockIO({})) == []


@pytest.mark.parametrize("name", REWRITE)
def test_dead_channels_and_zero_weights_give_usable_scales(name: str, toy: Any) -> None:
    inputs = {n: x.clone() for n, x in toy.inputs.items()}
    for x in inputs.values():
        x[:, :3] = 0
    tensors = {n: t.clone() for n, t in toy.tensors.items()}
    for n in ("q", "k", "v", "up", "o", "down"):
        tensors[n][:, 2:5] = 0
    other = type(toy)(tensors, inputs, toy.block)
    for f in _rewrite(name, other.view(), other.io(), **_everywhere(name)):
        assert bool(((f.scale > 0) & torch.isfinite(f.scale)).all())


def _rounded(tensors: dict[str, Tensor], folds: Sequence[ScaleFold], toy: Any, options: rtn.Options) -> float:
    """Summed output error of all linears after rounding to nearest, in float64."""
    total = 0.0
    stats = dict(toy.io().stats)
    for f in folds:
        stats[f.link.site] = stats[f.link.site].scaled(1 / f.scale)
    scaled = {x.name: toy.tensors[x.name].clone() for x in toy.block.linears}
    for f in folds:
        for reader in f.link.readers:
            scaled[reader] *= f.scale
    for linear in toy.block.linears:
        w = scaled[linear.name]
        d = (w - rtn.compress(Layer("x", w), stats[linear.site], TARGET, options).decode()).double()
        total += float(((d @ stats[linear.site].need("gram").double()) * d).sum())
    return total


@pytest.mark.parametrize("options", [{"even": False}, {}, {"judge": "sweep"}, {"rows": 16}, {"outputs": "linears"}])
def test_awq_lowers_the_error_of_rounding(options: dict[str, Any], toy: Any) -> None:
    nearest = rtn.Options(steps=8)
    folds = _rewrite("awq", toy.view(), toy.io(), **options)
    assert _rounded(toy.tensors, folds, toy, nearest) < _rounded(toy.tensors, [], toy, nearest)


def test_awq_leaves_links_alone_that_gain_too_little(toy: Any) -> None:
    """The more each must gain, the fewer stay, and those that stay have the scale that they had."""
    kept = [_rewrite("awq", toy.view(), toy.io(), gain=gain) for gain in (0.0, 0.25, 0.5, 0.75, 0.99)]
    counts = [len(folds) for folds in kept]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 2
    assert counts[-1] == 0
    before = {(f.link.producer, f.link.site): f.scale for f in kept[0]}
    assert all(torch.equal(f.scale, before[f.link.producer, f.link.site]) for folds in kept for f in folds)


def test_awq_with_even_inputs_and_weights_changes_nothing_by_input_size(toy: Any) -> None:
    """Inputs of one size: m^a is constant, so s = 1 and nothing is gained."""
    g = torch.Generator().manual_seed(0)
    signs = {n: (torch.randint(0, 2, x.shape, generator=g) * 2 - 1).float() for n, x in toy.inputs.items()}
    other = type(toy)(toy.tensors, signs, toy.block)
    assert _rewrite("awq", other.view(), other.io(), even=False) == []


@pytest.mark.parametrize(("judge", "later"), [("rounding", rtn), ("sweep", gptq)])
def test_awq_judges_attention_by_the_blocks_output(judge: str, later: Any, toy: Any) -> None:
    """Values alone leave the block; queries are a thousand times as large, and the sum of outputs sees only them."""
    tensors = toy.tensors | {"q": toy.tensors["q"] * 1000}
    # What evens out the columns of q makes those of v uneven.
    tensors["v"] = tensors["v"] / tensors["q"].square().mean(0).sqrt() * 10
    gram = toy.io().stats["q"].need("gram")

    def lost(name: str, weight: Tensor) -> float:
        d = (tensors[name] - weight).double()
        return float(((d @ gram.double()) * d).sum())

    asked: list[float] = []

    def moved(weights: Mapping[str, Tensor]) -> float:
        assert set(weights) == {"q", "k", "v"}
        asked.append(lost("v", weights["v"]))
        return asked[-1]

    other = type(toy)(tensors, toy.inputs, toy.block)
    io = BlockIO(toy.io().stats, movement=moved)

    def errors(**options: Any) -> dict[str, float]:
        folds = _rewrite("awq", other.view(), io, judge=judge, rows=0, **options)
        scale = next((f.scale for f in folds if f.link.site == "q"), torch.ones(48))
        stats = io.stats["q"].scaled(1 / scale)
        how = later.Options(steps=8)
        return {
            n: lost(n, later.compress(Layer(n, tensors[n] * scale), stats, TARGET, how).decode() / scale) for n in "qv"
        }

    alike = errors(outputs="linears")
    assert asked == []
    block = errors(outputs="block")
    assert len(asked) == 1 + 4 + 19
    assert alike["q"] < block["q"]
    assert block["v"] < 0.7 * alike["v"]
    assert block["v"] == pytest.approx(min(asked), rel=1e-4)  # what was tried is what the later step makes


def test_awq_needs_bits(toy: Any) -> None:
    with pytest.raises(PlanError, match="bits"):
        _rewrite("awq", toy.view(), toy.io(), Target(group_size=16))


def test_smoothquant_is_the_printed_formula(toy: Any) -> None:
    """s = max|X|^a / max|W|^(1-a); with a = 1 all inputs reach exactly 1."""
    io = toy.io()
    for alpha in (0.0, 0.3, 1.0):
        for f in _rewrite("smoothquant", toy.view(), io, alpha=alpha):
            x = toy.inputs[f.link.site].double().abs().amax(0)
            w = torch.stack([toy.tensors[r].double().abs().amax(0) for r in f.link.readers]).amax(0)
            torch.testing.assert_close(f.scale.double(), x**alpha / w ** (1 - alpha), rtol=1e-5, atol=0)
            if alpha == 1.0:
                torch.testing.assert_close(x / f.scale.double(), torch.ones_like(x), rtol=1e-5, atol=0)


def test_smoothquant_has_the_formula_of_fptq_too(toy: Any) -> None:
    """s = max|X| / log2(2 + max|X|), where the largest input of a site is between the two cuts."""
    io = toy.io()
    for f in (found := _rewrite("smoothquant", toy.view(), io, scale="fptq", smallest=0.0, largest=1e9)):
        x = toy.inputs[f.link.site].double().abs().amax(0)
        torch.testing.assert_close(f.scale.double(), x / torch.log2(2 + x), rtol=1e-5, atol=0)
    largest = sorted(float(toy.inputs[f.link.site].abs().max()) for f in found)
    assert len(found) == len(_rewrite("smoothquant", toy.view(), io))
    above = _rewrite("smoothquant", toy.view(), io, scale="fptq", smallest=largest[-1] * 1.01, largest=1e9)
    below = _rewrite("smoothquant", toy.view(), io, scale="fptq", smallest=0.0, largest=largest[0])
    assert not above
    assert not below


@pytest.mark.parametrize("name", READING)
def test_inputs_that_are_always_zero_get_no_scale(name: str, toy: Any) -> None:
    """All inputs of all sites, and some of them."""
    for share in (0.0, 0.5):
        io = toy.io()
        dead = {
            site: stats.scaled((torch.arange(stats.width) >= (1 - share) * stats.width).float())
            for site, stats in io.stats.items()
        }
        folds = _rewrite(name, toy.view(), BlockIO(dead), **_everywhere(name))
        for f in folds:
            assert bool(torch.isfinite(f.scale).all())
            assert float(f.scale.min()) > 0
        if not share:
            assert all(torch.equal(f.scale, torch.ones_like(f.scale)) for f in folds)
