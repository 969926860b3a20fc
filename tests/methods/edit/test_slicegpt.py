"""A narrower residual stream: nothing changes at 0 %, what is cut is the energy of the last directions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lilliput import api
from lilliput.algebra.rotations import principal
from lilliput.errors import PlanError
from lilliput.methods.edit import slicegpt
from lilliput.methods.learn import principal as directions
from lilliput.model.edited import Edit, EditedModel
from lilliput.model.rotated import RotatedModel
from lilliput.progress import Quiet
from lilliput.streaming.backward import Samples
from lilliput.verbs.edits import Units

Tiny = Callable[[str], Path]
RUN: dict[str, Any] = {"samples": 8, "tokens": 32, "device": "cpu", "dtype": "float32", "progress": Quiet()}


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    skeleton = model.skeleton
    skeleton.load({name: model.read(name) for name in skeleton.shapes})
    with torch.no_grad():
        result: torch.Tensor = skeleton.model(input_ids=ids, use_cache=False).logits
    return result


def test_principal_directions_are_those_of_what_the_readers_see(toy: Any, tmp_path: Path) -> None:
    ready = RotatedModel(toy.model)
    (fold,) = directions.learn(ready, Samples(toy.ids, tmp_path), {}, directions.Options())
    seen: list[torch.Tensor] = []
    for layer in toy.whole.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(lambda m, _, out: seen.append((out / m.weight).reshape(-1, 24).double()))
    with torch.no_grad():
        toy.whole(input_ids=toy.ids, use_cache=False)
    for layer in toy.whole.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm._forward_hooks.clear()
    grams = [x.T @ x for x in seen]
    expected = principal(sum(g / g.diagonal().mean() for g in grams))  # type: ignore[arg-type]
    overlap = (fold.matrix.T @ expected).abs()
    torch.testing.assert_close(overlap.diagonal(), torch.ones(24, dtype=torch.float64), rtol=0, atol=1e-3)


def test_a_turned_model_that_keeps_all_channels_is_the_whole_one(toy: Any, tmp_path: Path) -> None:
    ready = RotatedModel(toy.model)
    (fold,) = directions.learn(ready, Samples(toy.ids, tmp_path), {}, directions.Options())
    with torch.no_grad():
        expected = toy.whole(input_ids=toy.ids, use_cache=False).logits
    scale = float(expected.abs().max())
    whole = EditedModel(ready.rotated(fold.matrix), Edit((0, 1, 2), hidden=24))
    assert float((logits(whole, toy.ids) - expected).abs().max()) / scale < 1e-4


def test_what_leaves_are_the_last_columns_of_readers_and_rows_of_writers(toy: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(24, 24, generator=draw, dtype=torch.float64)).Q
    ready = RotatedModel(toy.model).rotated(basis)
    narrow = EditedModel(ready, Edit((0, 1, 2), hidden=16))
    assert narrow.skeleton.hidden_size == 16
    assert narrow.shape("model.layers.0.self_attn.q_proj.weight")[1] == 16
    assert narrow.shape("model.layers.0.self_attn.o_proj.weight")[0] == 16
    gain = narrow.read("model.layers.0.input_layernorm.weight")
    torch.testing.assert_close(gain, torch.full((16,), (24 / 16) ** 0.5))
    wide, thin = ready.read("model.layers.1.mlp.up_proj.weight"), narrow.read("model.layers.1.mlp.up_proj.weight")
    assert torch.equal(thin, wide[:, :16])


def test_the_width_that_stays_is_one_that_heads_divide() -> None:
    units = [Units((8,), 3, 1, 1, 1, 576, 9)]
    assert slicegpt.sizes(units, slicegpt.Options(ratio=0.25)).hidden == 432
    assert slicegpt.sizes(units, slicegpt.Options(ratio=0.2, multiple=3)).hidden == 459
    with pytest.raises(PlanError, match="9 query heads"):
        slicegpt.sizes(units, slicegpt.Options(ratio=0.05))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_sliced_folder_is_a_stock_model(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    done = api.compress(tiny(kind), tmp_path / "out", recipe="slicegpt", settings=["slicegpt.ratio=0.25"],
                        eval_windows=0, **RUN)  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_size"] == 48
    assert config["head_dim"] == 16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert bool(torch.isfinite(model(torch.arange(9)[None]).logits).all())
    assert done.engine is not None
    assert not done.engine.problems


def test_it_needs_a_turned_stream_and_goes_with_what_follows(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="put `principal` before it"):
        api.plan(tiny("llama"), recipe="steps: [{method: slicegpt}]\n", samples=2, tokens=32)
    recipe = """steps:
  - {method: drop-layers}
  - {method: principal}
  - {method: slicegpt, options: {ratio: 0.25}}
  - {method: gptq, target: {group_size: 16}}
"""
    done = api.compress(tiny("llama"), tmp_path / "out", recipe=recipe, eval_windows=0, **RUN)
    assert done.plan.bytes == sum(x.stat().st_size for x in (tmp_path / "out").glob("*.safetensors"))
