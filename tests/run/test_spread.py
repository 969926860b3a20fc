"""Blocks whose widths an edit divides by its scores: planned weights, the native folder in transformers, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lilliput import api
from lilliput.errors import PlanError
from lilliput.model.stored import open_model
from lilliput.progress import Quiet

Tiny = Callable[[str], Path]
ROOM: dict[str, Any] = {"samples": 4, "tokens": 32, "device": "cpu", "dtype": "float32"}
RUN: dict[str, Any] = {**ROOM, "progress": Quiet()}
FLAP = "{method: flap, options: {ratio: 0.4, kinds: [channel, head], uniform: false}}"
QUANTIZED = "{method: gptq, target: {bits: 4, group_size: channel}}"


@pytest.fixture
def uneven(tiny: Tiny, tmp_path: Path) -> Path:
    """A model in which some blocks matter less than others."""
    model = AutoModelForCausalLM.from_pretrained(tiny("wide"))
    from transformers import AutoTokenizer

    with torch.no_grad():
        for n, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight[:, n::2] *= 0.1
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny("wide")).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("steps", [(FLAP,), (FLAP, "{method: refit}", QUANTIZED)])
def test_the_folder_opens_after_import(uneven: Path, tmp_path: Path, steps: tuple[str, ...]) -> None:
    recipe = "steps:\n" + "".join(f"  - {x}\n" for x in steps)
    out = tmp_path / "out"
    done = api.compress(uneven, out, recipe=recipe, eval_windows=2, **RUN)
    assert done.engine is not None
    assert not done.engine.problems
    assert api.verify(out).problems == ()
    config = json.loads((out / "config.json").read_text())
    widths = {x["linears"]["mlp.down_proj"][1] for x in config["block_sizes"].values()}
    assert len(widths) > 1
    assert config["quantization_config"]["quant_method"] == "lilliput"
    again = open_model(out)
    planned = sum(x.linear.parameters for x in done.plan.resolved.linears)
    assert planned == sum(x.parameters for block in again.anatomy().blocks for x in block.linears)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        told = model.generate(ids, max_new_tokens=4, do_sample=False)
        want = model(ids).logits
    assert told.shape == (1, 24)
    skeleton = again.skeleton
    skeleton.load({name: again.read(name) for name in skeleton.shapes})
    with torch.no_grad():
        torch.testing.assert_close(skeleton.model(ids).logits, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(PlanError, match="its blocks differ in width"):
        api.convert(out, tmp_path / "out.gguf", to="gguf")


def test_as_many_weights_stay_as_with_equal_widths(uneven: Path, tmp_path: Path) -> None:
    kept = []
    for name, uniform in (("even", "true"), ("uneven", "false")):
        recipe = f"steps:\n  - {{method: flap, options: {{ratio: 0.3, uniform: {uniform}}}}}\n"
        done = api.compress(uneven, tmp_path / name, recipe=recipe, eval_windows=0, **RUN)
        kept.append(sum(x.linear.parameters for x in done.plan.resolved.linears))
    assert kept[0] == kept[1]


def test_a_killed_run_goes_on_with_the_widths_of_the_journal(uneven: Path, tmp_path: Path) -> None:
    recipe = f"steps:\n  - {FLAP}\n  - {{method: refit}}\n"
    api.compress(uneven, tmp_path / "whole", recipe=recipe, eval_windows=0, **RUN)

    class Killed(Quiet):
        def step(self, done: int, total: int, note: str = "") -> None:
            if note.startswith("error") and done == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.compress(uneven, tmp_path / "out", recipe=recipe, eval_windows=0, **ROOM, progress=Killed())
    api.compress(uneven, tmp_path / "out", recipe=recipe, eval_windows=0, **RUN)
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_engines_with_one_width_are_refused_before_work(uneven: Path, tiny: Tiny, tmp_path: Path) -> None:
    recipe = f"export: compressed-tensors\nsteps:\n  - {FLAP}\n"
    with pytest.raises(PlanError, match="uniform: true"):
        api.plan(uneven, recipe=recipe, **ROOM)
    with pytest.raises(PlanError, match="uniform"):
        api.compress(uneven, tmp_path / "x.gguf", recipe=f"steps:\n  - {FLAP}\n", to="gguf", eval_windows=0, **RUN)
    with pytest.raises(PlanError, match="experts of a block"):
        api.plan(tiny("mixtral"), recipe="steps:\n  - {method: flap, options: {uniform: false}}\n", **ROOM)
