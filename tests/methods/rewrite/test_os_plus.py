"""Outlier Suppression+ and its predecessor against their equations, and the models that they leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from lilliput import api
from lilliput.anatomy.model import Block, Linear, Link, Site
from lilliput.folds.kinds import ScaleFold, ShiftFold
from lilliput.methods.rewrite import os_plus, outlier_suppression
from lilliput.model.block import BlockWeights
from lilliput.model.stored import open_model
from lilliput.progress import Quiet
from lilliput.stats import fold
from lilliput.target import Target
from lilliput.verbs.view import BlockIO, BlockView

Tiny = Callable[[str], Path]
TARGET = Target.model_validate({"bits": 4, "group_size": "channel", "scale_dtype": "float32"})


def case(shifts: bool = True) -> tuple[Tensor, Tensor, BlockView, BlockIO]:
    """Inputs with channels off their middle and some that are large; one linear that reads them."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 32, generator=g) + torch.randn(32, generator=g)
    x[:, 3] = 20 + 4 * x[:, 3]
    x[:, 9] *= 30
    w = torch.randn(24, 32, generator=g)
    link = Link("norm", "norm", ("up",), "up", torch.arange(32), shifts=shifts)
    block = Block((Linear("up", "up", "up", 24, 32, bias=True),), (Site("up", 32, ("up",), 0),), (link,), ())
    stats = fold.finish(fold.update(fold.init(32, fold.NAMES), x))
    return x, w, BlockView(block, {"up": w}, {"norm": torch.ones(32)}), BlockIO({"up": stats})


def run(view: BlockView, io: BlockIO, **options: Any) -> dict[type, Any]:
    return {type(f): f for f in os_plus.rewrite(view, io, TARGET, os_plus.Options.model_validate(options))}


def rounded(w: Tensor, bits: int) -> Tensor:
    """Symmetric, one scale a row, in loops."""
    out = torch.empty_like(w)
    for i, row in enumerate(w):
        step = max(abs(float(v)) for v in row) / (2 ** (bits - 1) - 1)
        for j, v in enumerate(row):
            out[i, j] = max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, round(float(v) / step))) * step
    return out


def judged(x: Tensor, w: Tensor, z: Tensor, s: Tensor, bits: int) -> tuple[float, float]:
    """The equation of the docstring, and the error of rounding the samples, float64."""
    inputs, scaled = (x - z) / s, w * s
    values = rounded(scaled, 4)
    step = float(inputs.abs().max()) * 2 / (2**bits - 1)
    miss = inputs @ (scaled - values).T
    noise = step * step / 12 * len(x) * float(values.square().sum())
    true = (inputs / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
    return float(miss.square().sum()) + noise, float((inputs @ scaled.T - true @ values.T).square().sum())


@pytest.mark.parametrize("shifts", [True, False])
def test_shift_and_scale_are_those_of_the_equations(shifts: bool) -> None:
    x, w, view, io = case(shifts)
    found = run(view, io, input_bits=6, grid=10)
    wide, weight = x.double(), w.double()
    middle = (wide.amax(0) + wide.amin(0)) / 2
    z = middle if shifts else torch.zeros(32, dtype=torch.float64)
    assert (ShiftFold in found) == shifts
    if shifts:
        torch.testing.assert_close(found[ShiftFold].shift.double(), z, rtol=1e-5, atol=1e-6)
    reach = (wide - z).abs().amax(0) if shifts else wide.abs().amax(0)
    scales = [(reach / (reach.max() * n / 10)).clamp(min=1.0) for n in range(1, 11)]
    errors = [judged(wide, weight, z, s, 6) for s in scales]
    best = min(range(10), key=lambda n: errors[n][0])
    torch.testing.assert_close(found[ScaleFold].scale.double(), scales[best], rtol=1e-4, atol=0)
    assert errors[best][0] < errors[-1][0]
    assert errors[best][1] < 1.3 * min(e for _, e in errors)  # the noise is close to what rounding does


def test_limits() -> None:
    """Symmetric channels are not shifted; one threshold is a pure shift; no tokens, no folds."""
    x, _, view, io = case()
    both = fold.finish(fold.update(fold.init(32, fold.NAMES), torch.cat([x, -x])))
    assert ShiftFold not in run(view, BlockIO({"up": both}))
    only = run(view, io, grid=1)
    assert torch.equal(only[ScaleFold].scale, torch.ones(32))
    assert ShiftFold in only
    assert ShiftFold not in run(view, io, shift=False)
    assert run(view, BlockIO({})) == {}


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_a_block_whose_norms_have_biases_computes_what_it_did(tiny: Tiny, name: str) -> None:
    model = open_model(tiny(name))
    weights = BlockWeights(model, 1, model.anatomy().blocks[1])
    draw = torch.Generator().manual_seed(0)
    shifted = [x for x in weights.anatomy.links if x.shifts]
    assert len(shifted) == 2
    folds = [ShiftFold(x, torch.randn(len(x.index), generator=draw)) for x in shifted]
    before = {n: weights.tensor(n) for n in weights.names()}
    weights.fold(folds)
    for link, made in zip(shifted, folds, strict=True):
        norm = f"{link.producer}.bias"
        torch.testing.assert_close(weights.tensor(norm), before[norm] - made.shift)
        for reader in link.readers:
            added = weights.linear(weights.anatomy.linear(reader)) @ made.shift
            torch.testing.assert_close(weights.tensor(f"{reader}.bias"), before[f"{reader}.bias"] + added)
            assert not weights.folded(f"{reader}.weight")


def test_gains_move_into_the_readers() -> None:
    _, _, view, io = case()
    gain = torch.linspace(-3, 4, 32)
    gain[5] = 0.0
    (made,) = outlier_suppression.rewrite(
        BlockView(view.anatomy, view.weights, {"norm": gain}), io, TARGET, outlier_suppression.Options()
    )
    assert float(made.scale[5]) == 1.0
    torch.testing.assert_close(gain / made.scale, gain.sign())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["os-plus", "outlier-suppression"])
@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_the_written_model_computes_what_it_did(tiny: Tiny, tmp_path: Path, method: str, name: str) -> None:
    recipe = (
        f"export: lilliput\nsteps:\n  - {{method: {method}}}\n  - {{method: magnitude, target: {{sparsity: 0.0}}}}\n"
    )
    api.compress(
        tiny(name), tmp_path / "out", recipe=recipe, samples=4, tokens=32, eval_windows=0, dtype="float32",
        progress=Quiet(),
    )  # fmt: skip
    ids = torch.arange(2, 34).view(1, -1)
    with torch.no_grad():
        ours, theirs = (
            tf.AutoModelForCausalLM.from_pretrained(x, dtype=torch.float32)(ids).logits
            for x in (tmp_path / "out", tiny(name))
        )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))
    changed, plain = open_model(tmp_path / "out"), open_model(tiny(name))
    norm = f"{plain.skeleton.block_names[0]}.{plain.anatomy().blocks[0].links[0].producer}.weight"
    assert not torch.equal(changed.read(norm), plain.read(norm)) or method == "outlier-suppression"
