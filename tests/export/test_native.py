"""What the native layout makes of linears that are only pruned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lilliput import api
from lilliput.export.native import Native
from lilliput.export.outcome import Outcome
from lilliput.parts.layer import Layer
from lilliput.parts.scheme import Scheme
from lilliput.progress import Quiet

Tiny = Callable[[str], Path]
ROOM: dict[str, Any] = {"samples": 2, "tokens": 32, "device": "cpu", "dtype": "float32", "eval_windows": 0}


def _pruned(source: Path, out: Path, pattern: str, layout: str) -> Any:
    recipe = f"export: {layout}\nsteps:\n  - method: wanda\n    target: {{pattern: '{pattern}'}}\n"
    return api.compress(source, out, recipe=recipe, progress=Quiet(), **ROOM)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
def test_a_pattern_stores_what_it_keeps_and_runs_as_the_dense_folder_does(
    tiny: Tiny, tmp_path: Path, kind: str, pattern: str
) -> None:
    source = tiny(kind)
    plain = _pruned(source, tmp_path / "plain", pattern, "compressed-tensors")
    done = _pruned(source, tmp_path / "packed", pattern, "lilliput")
    assert done.plan.bytes == sum(x.stat().st_size for x in done.out.glob("*.safetensors")) < plain.plan.bytes
    assert any("store only the weights that their pattern keeps" in x for x in done.plan.notes)
    assert not any("stored as values" in x for x in done.plan.notes)
    here, there = (AutoModelForCausalLM.from_pretrained(x.out).eval() for x in (done, plain))
    ids = torch.arange(16)[None]
    torch.testing.assert_close(here(ids).logits, there(ids).logits, rtol=1e-4, atol=1e-5)


def _outcome(pattern: str | None) -> Outcome:
    return Outcome("x", "x", 6, 16, Scheme(), torch.float16, sparsity=0.5, pattern=pattern)


def test_a_pattern_that_saves_nothing_stays_dense() -> None:
    for pattern in (None, "4:4", "15:16", "300:600"):
        assert list(Native().describe(_outcome(pattern))) == ["x.weight"]
    assert sorted(Native().describe(_outcome("2:4"))) == ["x.weight", "x.weight_place"]


def test_zeros_elsewhere_than_planned_are_not_written() -> None:
    layer = Layer("x", torch.ones(6, 16))
    with pytest.raises(ValueError, match="is not pruned"):
        Native().pack(_outcome("2:4"), layer)
    with pytest.raises(ValueError, match="holds more"):
        Native().pack(_outcome("2:4"), layer.with_support(torch.ones(6, 16, dtype=torch.bool)))
