"""LASER against a sum of singular terms, dense and factored, and its place in a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lilliput import api
from lilliput.errors import PlanError
from lilliput.methods.weight.laser import Options, compress, rank_of, scheme
from lilliput.parts.layer import Layer
from lilliput.progress import Quiet
from lilliput.recipe.schema import Recipe, Step
from lilliput.stats.site import SiteStats
from lilliput.target import Target

Tiny = Callable[[str], Path]


def weight(rows: int = 20, width: int = 30) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def reference(w: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(w.double(), full_matrices=False)
    out = torch.zeros(w.shape, dtype=torch.float64)
    for i in range(rank):
        out += s[i] * torch.outer(u[:, i], vt[i])
    return out


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize(("kept", "rank"), [(0.01, 1), (0.27, 5), (0.5, 10)])
def test_the_leading_terms_stay(kept: float, rank: int, factored: bool) -> None:
    options = Options(kept=kept, factored=factored, factors="float32")
    out = compress(Layer("x", weight()), SiteStats(30, 0), Target(), options).decode()
    torch.testing.assert_close(out.double(), reference(weight(), rank), rtol=1e-4, atol=1e-5)
    assert rank_of(Target(), options, 20, 30) == rank
    assert rank_of(Target(rank=3), options, 20, 30) == 3


def test_everything_kept_is_the_identity() -> None:
    out = compress(Layer("x", weight()), SiteStats(30, 0), Target(), Options(kept=1.0))
    assert torch.equal(out.decode(), weight())


def test_factors_that_save_nothing_are_refused() -> None:
    assert scheme(Target(rank=11), Options(factored=True), 20, 30).size_bits(20, 30) == 11 * 50 * 16
    with pytest.raises(PlanError, match=r"give a rank below 12, kept below 0\.60, or factored=false"):
        scheme(Target(rank=12), Options(factored=True), 20, 30)
    assert scheme(Target(rank=12), Options(), 20, 30).parts == ()
    with pytest.raises(PlanError, match="give 1 to 20"):
        scheme(Target(rank=21), Options(), 20, 30)


def _steps(*steps: dict[str, Any]) -> Recipe:
    return Recipe(steps=tuple(Step.model_validate(x) for x in steps))


def test_a_dense_result_is_a_plain_tensor_and_nothing_else_changes(tiny: Tiny, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    recipe = _steps({"method": "laser", "options": {"kept": 0.1}, "where": {"include": [name]}})
    done = api.compress(tiny("llama"), tmp_path / "out", recipe=recipe, tokens=8, eval_windows=0, progress=Quiet())
    tensors: dict[str, Tensor] = {}
    for path in sorted(done.out.glob("*.safetensors")):
        tensors |= load_file(path)
    before = load_file(tiny("llama") / "model.safetensors")
    changed = {x for x in tensors if not torch.equal(tensors[x], before[x])}
    assert changed == {f"{name}.weight"}
    expected = reference(before[f"{name}.weight"], 6)
    torch.testing.assert_close(tensors[f"{name}.weight"].double(), expected, rtol=1e-4, atol=1e-5)
    assert done.plan.quantization_config is None
    (row,) = done.rows
    assert row["error"] == pytest.approx(
        float((expected - before[f"{name}.weight"]).norm() / before[f"{name}.weight"].norm())
    )
