"""Blocks of weights that stay or leave as a whole, against a loop over them; and what the plan counts of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from lilliput import api
from lilliput.errors import PlanError
from lilliput.methods.weight import magnitude
from lilliput.model.stored import open_model
from lilliput.parts.layer import Layer
from lilliput.progress import Quiet
from lilliput.stats.site import SiteStats
from lilliput.target import Target


@pytest.mark.parametrize(("scope", "block", "sparsity"), [("layer", (4, 8), 0.4), ("row", (2, 6), 0.5)])
def test_the_blocks_of_least_norm_leave_as_a_whole(
    scope: Literal["layer", "row"], block: tuple[int, int], sparsity: float
) -> None:
    w = torch.randn(24, 48, generator=torch.Generator().manual_seed(1))
    options, target = magnitude.Options(scope=scope, block=block), Target(sparsity=sparsity)
    got = magnitude.compress(Layer("x", w), SiteStats(1, 0), target, options)
    r, c = block
    norms = {
        (i, j): float(w[i * r : i * r + r, j * c : j * c + c].double().norm())
        for i in range(24 // r)
        for j in range(48 // c)
    }
    rivals = [list(norms)] if scope == "layer" else [[x for x in norms if x[0] == i] for i in range(24 // r)]
    slow = torch.ones_like(w, dtype=torch.bool)
    for group in rivals:
        for i, j in sorted(group, key=lambda x: norms[x])[: round(sparsity * len(group))]:
            slow[i * r : i * r + r, j * c : j * c + c] = False
    assert got.support is not None
    assert torch.equal(got.support, slow)
    assert int(slow.sum()) == magnitude.kept(target, options, 24, 48)
    assert torch.equal(got.decode(), w * slow)


def test_a_block_of_one_weight_is_magnitude_and_what_does_not_fit_is_refused() -> None:
    w = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    single = magnitude.compress(Layer("x", w), SiteStats(1, 0), Target(sparsity=0.3), magnitude.Options()).support
    row = magnitude.compress(
        Layer("x", w), SiteStats(1, 0), Target(sparsity=0.3), magnitude.Options(block=(1, 1))
    ).support
    assert single is not None
    assert row is not None
    assert torch.equal(single, row)
    with pytest.raises(PlanError, match="do not divide a matrix of 8 x 12"):
        magnitude.kept(Target(sparsity=0.5), magnitude.Options(block=(5, 2)), 8, 12)
    with pytest.raises(PlanError, match="is of single weights"):
        magnitude.kept(Target(pattern="2:4"), magnitude.Options(block=(4, 4)), 8, 12)
    with pytest.raises(ValueError, match="at least one row"):
        magnitude.Options(block=(0, 4))


def test_blocks_are_stored_in_the_planned_bytes_and_read_back(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = "export: lilliput\nsteps:\n  - {method: magnitude, target: {sparsity: 0.75}, options: {block: [16, 16]}}\n"
    run: dict[str, Any] = {"samples": 2, "tokens": 32, "device": "cpu", "dtype": "float32", "eval_windows": 0}
    done = api.compress(tiny("llama"), tmp_path / "out", recipe=recipe, **run, progress=Quiet())
    assert done.plan.bytes == sum(x.stat().st_size for x in (tmp_path / "out").glob("*.safetensors"))
    before, after = open_model(tiny("llama")), open_model(tmp_path / "out")
    for prefix, block in zip(before.skeleton.block_names, before.anatomy().blocks, strict=True):
        for linear in block.linears:
            old, new = (x.read(f"{prefix}.{linear.name}.weight") for x in (before, after))
            whole = new.view(old.shape[0] // 16, 16, old.shape[1] // 16, 16).ne(0).sum((1, 3))
            assert set(whole.unique().tolist()) == {0, 256}
            assert int((whole > 0).sum()) == whole.numel() - round(0.75 * whole.numel())
            assert bool((new == old)[new != 0].all())
