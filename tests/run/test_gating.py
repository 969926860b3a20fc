"""Edits whose scores are trained gates: the shape that was asked for, weights with gates in them, resumption."""

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
from lilliput.model.edit import Edit
from lilliput.progress import Quiet
from lilliput.run.journal import Work
from lilliput.training import loop

Tiny = Callable[[str], Path]
RUN: dict[str, Any] = {
    "samples": 4, "tokens": 32, "device": "cpu", "dtype": "float32", "eval_windows": 0, "progress": Quiet(),
}  # fmt: skip
SHEARED = (
    "steps:\n  - {method: sheared-llama, options: {layers: 1, heads: 1, channels: 96, hidden: 48, steps: 6, "
    "tokens: 32, save: 2, weights: WEIGHTS}}\n"
)


def weights(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))


@pytest.mark.parametrize("how", ["frozen", "trained", "adapters"])
def test_the_shape_is_exactly_the_one_that_was_named(tiny: Tiny, tmp_path: Path, how: str) -> None:
    done = api.compress(tiny("qwen2"), tmp_path / "out", recipe=SHEARED.replace("WEIGHTS", how), **RUN)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    wanted = {"num_hidden_layers": 1, "num_key_value_heads": 1, "intermediate_size": 96, "hidden_size": 48}
    assert {name: config[name] for name in wanted} == wanted
    assert done.plan.bytes == sum(x.stat().st_size for x in (tmp_path / "out").glob("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.arange(20)[None]).logits).all())
    assert api.verify(tmp_path / "out").problems == ()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["edit-gates", "edit", "edit-update"])
def test_a_run_that_is_stopped_ends_with_the_same_bytes(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    recipe = SHEARED.replace("WEIGHTS", "trained")
    api.compress(tiny("qwen2"), tmp_path / "whole", recipe=recipe, **RUN)
    note = Work.note

    def stopped(self: Work, record: dict[str, Any]) -> Any:
        result = note(self, record)
        if record["kind"] == kind:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Work, "note", stopped)
    with pytest.raises(KeyboardInterrupt):
        api.compress(tiny("qwen2"), tmp_path / "out", recipe=recipe, **RUN)
    monkeypatch.setattr(Work, "note", note)
    api.compress(tiny("qwen2"), tmp_path / "out", recipe=recipe, **RUN)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_training_of_gates_that_is_killed_goes_on_from_its_last_state(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = SHEARED.replace("WEIGHTS", "trained")
    api.compress(tiny("qwen2"), tmp_path / "whole", recipe=recipe, **RUN)
    rate, seen = loop.rate, []

    def killed(step: float, o: Any) -> float:
        seen.append(step)
        if step == 5 and seen.count(5) == 1:
            raise MemoryError
        return rate(step, o)

    monkeypatch.setattr(loop, "rate", killed)
    with pytest.raises(MemoryError):
        api.compress(tiny("qwen2"), tmp_path / "out", recipe=recipe, **RUN)
    seen.clear()
    seen.append(5)
    api.compress(tiny("qwen2"), tmp_path / "out", recipe=recipe, **RUN)
    assert min(seen) == 4
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


METHODS = [
    "{method: hard-concrete, options: {ratio: 0.25, kinds: [channel, head], steps: 4, tokens: 32}}",
    "{method: hard-concrete, options: {ratio: 0.25, penalty: 1.0, relax: plain, steps: 4, tokens: 32}}",
    "{method: hard-concrete, options: {ratio: 0.3, uniform: false, kinds: [channel, head], steps: 4, tokens: 32}}",
    "{method: cofi, options: {ratio: 0.25, steps: 4, tokens: 32}}",
    "{method: compresso, options: {ratio: 0.25, steps: 4, tokens: 32}}",
]


@pytest.mark.slow
@pytest.mark.parametrize("step", METHODS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gates_narrow_blocks_by_as_much_as_was_asked_for(tiny: Tiny, tmp_path: Path, step: str, kind: str) -> None:
    if kind == "gpt2":  # whose config leaves no heads out
        step = step.replace("kinds: [channel, head], ", "").replace("ratio", "kinds: [channel], ratio")
    done = api.compress(tiny(kind), tmp_path / "out", recipe=f"steps:\n  - {step}\n", **RUN)
    assert done.plan.bytes == sum(x.stat().st_size for x in (tmp_path / "out").glob("*.safetensors"))
    original = sum(x.stat().st_size for x in tiny(kind).glob("*.safetensors"))
    assert done.plan.bytes < original


def test_what_gates_came_to_is_in_the_weights_of_what_stays(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gates that are half open once settled halve the columns that read them."""
    decided: list[Edit] = []
    note = Work.note

    def noted(self: Work, record: dict[str, Any]) -> Any:
        if record["kind"] == "edit":
            decided.append(Edit.from_plain(record["edit"]))
        return note(self, record)

    monkeypatch.setattr(Work, "note", noted)
    recipe = (
        "steps:\n  - {method: hard-concrete, options: {ratio: 0.2, kinds: [channel], steps: 12, tokens: 32, relax: "
        "plain, penalty: 50.0, gate_lr: 0.05, warmup: 0.0}}\n"
    )
    api.compress(tiny("llama"), tmp_path / "out", recipe=recipe, **RUN)
    before, after = (AutoModelForCausalLM.from_pretrained(x) for x in (tiny("llama"), tmp_path / "out"))
    for n in range(4):
        kept = list(decided[0].channels[n, 0])
        old = before.model.layers[n].mlp.down_proj.weight[:, kept]
        factor = (after.model.layers[n].mlp.down_proj.weight / old).detach()
        torch.testing.assert_close(factor, factor[:1].expand_as(factor), rtol=1e-3, atol=1e-3)
        assert 0.3 < float(factor.mean()) < 0.6  # twelve steps of 0.05 down from 1


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("{method: sheared-llama}", "makes nothing smaller"),
        ("{method: sheared-llama, options: {layers: 9}}", "9 layers cannot stay of 2"),
        ("{method: sheared-llama, options: {hidden: 50}}", "no multiple of the 4 query heads"),
        ("{method: sheared-llama, options: {layers: 1, protect: [0, 1]}}", "cannot leave"),
        ("{method: hard-concrete, options: {objective: minilm}}", "choose logit-kd, divergence-kd or cross-entropy"),
        ("{method: hard-concrete, options: {objective: full}}", "is no objective"),
    ],
)
def test_what_cannot_be_is_refused_by_the_plan(tiny: Tiny, step: str, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        api.plan(tiny("qwen2"), recipe=f"steps:\n  - {step}\n", samples=2, tokens=32)
