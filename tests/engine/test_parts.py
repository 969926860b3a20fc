"""Sums of parts and unusual grids, each on another linear of one model: planned, written, loaded by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lilliput import api
from lilliput.errors import PlanError
from lilliput.parts.linear import parse_config, read_linear
from lilliput.progress import Quiet
from lilliput.runtime.linear import CompressedLinear

STEPS = """
steps:
- {method: spqr, target: {bits: 3, group_size: 16, symmetric: false}, where: {include: [q_proj]}}
- {method: owq, target: {bits: 3, group_size: channel}, options: {columns: 3}, where: {include: [k_proj]}}
- {method: bcq, target: {format: binary, bits: 2, group_size: 32}, where: {include: [v_proj]}}
- {method: svid, target: {format: sign}, where: {include: [o_proj]}}
- {method: ternary, target: {format: ternary, group_size: 32}, where: {include: [gate_proj]}}
- {method: rex, target: {bits: 2, group_size: 32}, options: {terms: 3, share: 0.3}, where: {include: [up_proj]}}
- {method: rtn, target: {bits: 2, group_size: 32}, where: {include: [down_proj]}}
- {method: lorc, target: {rank: 4}, options: {factors: int8}, where: {include: [down_proj]}}
"""


def _compress(model: Path, recipe: str, out: Path) -> None:
    api.compress(
        model, out, recipe=recipe, samples=2, tokens=32, device="cpu", dtype="float32", eval_windows=0, progress=Quiet()
    )


def test_every_kind_loads_as_it_was_written(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    _compress(tiny("llama"), STEPS, out)
    tensors: dict[str, torch.Tensor] = {}
    for path in out.glob("*.safetensors"):
        tensors |= load_file(path)
    specs = parse_config(json.loads((out / "config.json").read_text())["quantization_config"])
    assert {part["kind"] for spec in specs.values() for part in spec.scheme.plain()["parts"]} == {
        "int", "sparse", "columns", "binary", "sign", "ternary", "rows", "low-rank"
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(out)
    packed = {name: m for name, m in model.named_modules() if isinstance(m, CompressedLinear)}
    assert len(packed) == len(specs) == 28
    for name, module in packed.items():
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        assert torch.equal(weight, read_linear(tensors, specs[name]))
        assert bool(weight.any())
    assert bool(torch.isfinite(model(torch.arange(12).unsqueeze(0)).logits).all())


@pytest.mark.parametrize(
    "step",
    [
        "{method: bcq, target: {format: binary, bits: 2, group_size: 32}}",
        "{method: svid, target: {format: sign}}",
    ],
)
def test_what_reaches_every_weight_is_refused_after_pruning(
    tiny: Callable[[str], Path], tmp_path: Path, step: str
) -> None:
    recipe = f"steps:\n- {{method: magnitude, target: {{pattern: '2:4'}}}}\n- {step}\n"
    with pytest.raises(PlanError, match="zeros"):
        _compress(tiny("llama"), recipe, tmp_path / "out")
