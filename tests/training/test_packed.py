"""Linears that stay packed: the gradient is the dense one's, and no decoded weight is kept for the way back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lilliput import api
from lilliput.model.stored import open_model
from lilliput.progress import Quiet
from lilliput.training import packed

CASES = {
    "int": ("llama", "{method: rtn, target: {bits: 4, group_size: 32}}"),
    "engine": ("llama", "{method: rtn, target: {bits: 4, group_size: 32}}\nexport: compressed-tensors"),
    "nf4": ("gpt2", "{method: rtn, target: {format: nf4, group_size: 64, scale_dtype: int8/256}}"),
    "binary": ("llama", "{method: bcq, target: {format: binary, bits: 2, group_size: 32}}"),
    "rounded": (
        "llama",
        "{method: rtn, target: {bits: 8}}\n- {method: act-static-dynamic, target: {bits: 8}}\nexport: lilliput",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_pass_through_codes_and_nothing_dense_is_kept(
    tiny: Callable[[str], Path], tmp_path: Path, case: str
) -> None:
    name, step = CASES[case]
    given: dict[str, Any] = {"samples": 2, "tokens": 16, "device": "cpu", "dtype": "float32", "eval_windows": 0}
    api.compress(tiny(name), tmp_path / "out", recipe=f"steps:\n- {step}\n", progress=Quiet(), **given)
    model = open_model(tmp_path / "out")
    block = model.skeleton.block_names[0]
    linear = next(x for x in model.anatomy().blocks[0].linears if x.role == "down")
    own = f"{block}.{linear.name}"
    weight = model.read(f"{own}.weight").float()
    weight = weight if name == "gpt2" else weight.T
    model.load(x for x in model.skeleton.shapes if x != f"{own}.weight")
    stored = model.stored_name(f"{own}.weight").removesuffix(".weight")
    shape = linear.out_features, linear.in_features
    assert packed.is_packed(model.source, stored)
    packed.hold(model.skeleton, model.source, stored, own, shape, linear.transposed)
    module = model.skeleton.model.get_submodule(own)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, linear.in_features, generator=draw, requires_grad=True)
    slope = torch.randn(2, 3, linear.out_features, generator=draw)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = module(x)
    out.backward(slope)
    assert max(kept, default=0) <= x.numel()
    torch.testing.assert_close(x.grad, slope @ weight.T, rtol=1e-4, atol=1e-5)
    held = sum(b.numel() * b.element_size() for b in module.buffers())
    assert held < weight.numel() * (2 if case == "rounded" else 1)
    with torch.no_grad():
        tolerance = 0.05 if case == "rounded" else 1e-4
        bias = getattr(module, "bias", None)
        plain = x @ weight if bias is None else x @ weight + bias
        assert float((out - plain).abs().max() / plain.abs().max()) < tolerance
