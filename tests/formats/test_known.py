"""Formats by name, from a recipe to a folder that transformers opens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lilliput import api
from lilliput.errors import PlanError, SourceError
from lilliput.formats import known, swept
from lilliput.formats.format import RangeRule
from lilliput.formats.ranged import Ranged, Spaced, check
from lilliput.formats.swept import Sweepable
from lilliput.progress import Quiet
from lilliput.target import Target

Tiny = Callable[[str], Path]
ROOM: dict[str, Any] = {"samples": 2, "tokens": 32, "device": "cpu", "dtype": "float32"}


def _recipe(method: str, target: str) -> str:
    return f"steps:\n  - method: {method}\n    target: {{{target}}}\n"


@pytest.mark.parametrize(("target", "says"), [
    ("format: nf4, group_size: 16", "nf4 g16"),
    ("format: mxfp4", "e2m1 g32 e8m0 scales"),
    ("format: nvfp4", "e2m1 g16 e4m3 scales"),
    ("format: nf3, group_size: 16, scale_dtype: int8/64", "nf3 g16 int8/64 scales"),
    ("bits: 3, group_size: 8, symmetric: false, scale_dtype: int3/4", "int3 g8 asym int3/4 scales"),
])  # fmt: skip
def test_a_folder_has_the_planned_bytes_and_opens(tiny: Tiny, tmp_path: Path, target: str, says: str) -> None:
    """q, k and v share a site: cut from one fit, or fitted alone where blocks of scales reach over rows."""
    done = api.compress(
        tiny("qwen2"), tmp_path / "out", recipe=_recipe("gptq", target), eval_windows=0, progress=Quiet(), **ROOM
    )
    assert done.plan.bytes == sum(x.stat().st_size for x in done.out.glob("*.safetensors"))
    assert {x.scheme.describe() for x in done.plan.compressed} == {says}
    assert all(0 < row["error"] < 0.6 for row in done.rows)
    model = AutoModelForCausalLM.from_pretrained(done.out)
    assert bool(torch.isfinite(model(torch.arange(8)[None]).logits).all())


@pytest.mark.parametrize(("target", "said"), [
    ("format: nf4, bits: 3", "step 1 .*'nf4' has 4 bits"),
    ("format: nf9", "unknown format 'nf9'.* Did you mean"),
    ("bits: 4, scale_dtype: int4/rows", "line 2: no kind of scales is called 'int4/rows'"),
    ("bits: 4, group_size: channel, scale_dtype: int4/row", "one scale per row cannot be"),
    ("format: codebook, group_size: channel, scale_dtype: int4/row", "scales of kind 'int4/row' are not possible"),
    ("format: e8, group_size: channel, scale_dtype: e4m3", "scales of kind 'e4m3' are not possible"),
    ("format: ternary, bits: 2", "'ternary' always has 1.6 bits a weight"),
    ("format: sign, group_size: 16", "'sign' has a value for each row and each column"),
    ("format: codebook, group_size: channel, symmetric: false", "'codebook' has no zero points"),
    ("format: codebook, bits: 8, group_size: 16", "256 levels for every 16 weights: .* at most 4 bits"),
])  # fmt: skip
def test_mistakes_are_found_by_the_plan(tiny: Tiny, target: str, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        api.plan(tiny("qwen2"), recipe=_recipe("rtn", target), **ROOM)


def test_rewrites_prepare_for_any_format(tiny: Tiny, tmp_path: Path) -> None:
    recipe = "steps:\n  - method: awq\n    options: {grid: 3, even: false}\n"
    recipe += "  - method: rtn\n    target: {format: nf4, group_size: 16}\n"
    done = api.compress(tiny("llama"), tmp_path / "out", recipe=recipe, eval_windows=0, progress=Quiet(), **ROOM)
    assert {x.scheme.describe() for x in done.plan.compressed} == {"nf4 g16"}


def test_unknown_names() -> None:
    with pytest.raises(PlanError, match="unknown format"):
        known.from_target(Target(format="bf4", bits=4, group_size=8))
    with pytest.raises(SourceError, match="newer"):
        known.from_plain({"kind": "next"})
    assert {"int", "nf4", "nvfp4"} <= set(known.names())


def test_a_name_that_fixes_the_bits_needs_none() -> None:
    assert known.completed(Target(format="e8")).bits == 2
    assert known.completed(Target(format="codebook")).bits is None


@pytest.mark.parametrize(
    "target", ["format: e8, bits: 2", "format: vector, bits: 2", "format: trellis", "format: affine"]
)
def test_formats_without_an_exact_zero_are_refused_after_pruning(tiny: Tiny, target: str) -> None:
    recipe = _recipe("magnitude", "sparsity: 0.5") + _recipe("rtn", f"{target}, group_size: channel").partition("\n")[2]
    with pytest.raises(PlanError, match="reaches every weight, so an earlier step's zeros would not stay"):
        api.plan(tiny("qwen2"), recipe=recipe, **ROOM)


@pytest.mark.parametrize("group", ["channel", "tensor", "16"])
def test_a_fitted_table_holds_the_zeros_of_pruned_weights(tiny: Tiny, tmp_path: Path, group: str) -> None:
    recipe = _recipe("magnitude", "sparsity: 0.5")
    recipe += _recipe("rtn", f"format: codebook, bits: 2, group_size: {group}").partition("\n")[2]
    done = api.compress(tiny("qwen2"), tmp_path / "out", recipe=recipe, eval_windows=0, progress=Quiet(), **ROOM)
    model = AutoModelForCausalLM.from_pretrained(done.out)
    linear = model.model.layers[0].self_attn.o_proj
    assert float((linear(torch.eye(linear.in_features)) == 0).double().mean()) >= 0.5


@pytest.mark.parametrize("name", known.names())
def test_a_format_says_what_it_can_do(name: str) -> None:
    """Zeros come back as zeros exactly where it says so, and sweeps take the formats that they name."""
    full = known.completed(Target(format=name))
    group = full.group_size if name.startswith(("mx", "nv")) else "channel"
    form = known.from_target(
        full.model_copy(update={"bits": full.bits or 2, "group_size": "channel" if name == "sign" else group})
    )
    assert isinstance(form, Sweepable) == (name in swept.NAMES)
    assert type(form) is type(known.from_plain(form.plain()))
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) + 0.3
    support = torch.rand(64, 256, generator=torch.Generator().manual_seed(1)) > 0.5
    weight = torch.where(support, weight, 0.0)
    grid = form.searched(weight, RangeRule("minmax"), support=support)
    held = bool((form.decode(form.encode(weight, grid), grid)[~support] == 0).all())
    assert held == form.holds_zero
    assert form.cost(64, 256).ram >= 0
    form.check(64, 256)


def test_only_formats_with_ranges_and_signed_scales_promise_them() -> None:
    forms = {name: known.completed(Target(format=name, bits=3)) for name in ("int", "nf3", "affine", "codebook")}
    made = {n: known.from_target(t.model_copy(update={"group_size": "channel"})) for n, t in forms.items()}
    assert [n for n, form in made.items() if isinstance(form, Ranged)] == ["int", "nf3"]
    assert [n for n, form in made.items() if isinstance(form, Spaced)] == ["affine"]
    assert [n for n, form in made.items() if form.signed_scales] == ["int"]
    with pytest.raises(PlanError, match="no scales of either sign"):
        check(made["affine"], RangeRule(signed_scale=True))
