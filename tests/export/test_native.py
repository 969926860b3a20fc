"""What the native layout makes of linears that are only pruned."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lilliput import api
from lilliput.export.native import Native
from lilliput.export.outcome import Outcome
from lilliput.model.stored import open_model
from lilliput.parts.layer import Layer
from lilliput.parts.scheme import Scheme
from lilliput.progress import Quiet

Tiny = Callable[[str], Path]
ROOM: dict[str, Any] = {"samples": 2, "tokens": 32, "device": "cpu", "dtype": "float32", "eval_windows": 0}


def _pruned(source: Path, out: Path, target: str, layout: str, step: str = "method: wanda") -> Any:
    recipe = f"export: {layout}\nsteps:\n  - {step}\n    target: {{{target}}}\n"
    return api.compress(source, out, recipe=recipe, progress=Quiet(), **ROOM)


def _same(source: Path, here: Any, there: Any) -> None:
    """Both folders hold the same weights; the smaller is read packed, by us and by transformers."""
    assert here.plan.bytes == sum(x.stat().st_size for x in here.out.glob("*.safetensors")) < there.plan.bytes
    whole = sum(prod(x) for x in open_model(str(source)).skeleton.shapes.values())
    assert here.plan.parameters == there.plan.parameters == whole
    assert any("pruned linears store only the weights that are kept" in x for x in here.plan.notes)
    assert not any("stored as values" in x for x in here.plan.notes)
    ours, theirs = (open_model(str(x.out)) for x in (here, there))
    for name in ours.skeleton.shapes:
        assert torch.equal(ours.read(name), theirs.read(name)), name
    packed, plain = (AutoModelForCausalLM.from_pretrained(x.out).eval() for x in (here, there))
    for ids in (torch.arange(16)[None], torch.tensor([[7]])):
        with torch.no_grad():  # so that a few tokens are multiplied with kept weights alone
            torch.testing.assert_close(packed(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("pattern", ["2:4", "1:8", "3:4"])
def test_a_pattern_stores_what_it_keeps_and_runs_as_the_dense_folder_does(
    tiny: Tiny, tmp_path: Path, kind: str, pattern: str
) -> None:
    source = tiny(kind)
    plain = _pruned(source, tmp_path / "plain", f"pattern: '{pattern}'", "compressed-tensors")
    _same(source, _pruned(source, tmp_path / "packed", f"pattern: '{pattern}'", "lilliput"), plain)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("scope", ["row", "layer"])
def test_zeros_anywhere_are_left_out_too(tiny: Tiny, tmp_path: Path, kind: str, scope: str) -> None:
    """Linears that share a site lie below each other in wanda, and still each has its own number of zeros."""
    source, step = tiny(kind), f"method: wanda\n    options: {{scope: {scope}}}"
    plain = _pruned(source, tmp_path / "plain", "sparsity: 0.55", "compressed-tensors", step)
    _same(source, _pruned(source, tmp_path / "packed", "sparsity: 0.55", "lilliput", step), plain)


def test_divided_sparsities_are_stored_exactly(tiny: Tiny, tmp_path: Path) -> None:
    source, step = tiny("llama"), "method: owl\n  - method: wanda"
    plain = _pruned(source, tmp_path / "plain", "sparsity: 0.7", "compressed-tensors", step)
    done = _pruned(source, tmp_path / "packed", "sparsity: 0.7", "lilliput", step)
    assert len({x.kept for x in done.plan.outcomes.values() if x.in_features == 64 == x.out_features}) > 1
    _same(source, done, plain)


def _outcome(pattern: str | None, kept: int | None = None) -> Outcome:
    return Outcome("x", "x", 6, 16, Scheme(), torch.float16, sparsity=0.5, pattern=pattern, kept=kept)


def test_what_saves_nothing_stays_dense() -> None:
    for pattern in (None, "4:4", "15:16", "300:600"):
        assert list(Native().describe(_outcome(pattern))) == ["x.weight"]
    assert list(Native().describe(_outcome(None, 90))) == ["x.weight"]
    assert sorted(Native().describe(_outcome("2:4"))) == ["x.weight", "x.weight_place"]
    assert Native().describe(_outcome(None, 48)) == {
        "x.weight": (torch.float16, (48,)),
        "x.weight_mask": (torch.uint8, (6, 2)),
    }
    note = Native().dense_note([_outcome(None)])
    assert note is not None
    assert "stored as values" in note


def test_zeros_elsewhere_than_planned_are_not_written() -> None:
    layer = Layer("x", torch.ones(6, 16))
    for outcome in (_outcome("2:4"), _outcome(None, 48)):
        with pytest.raises(ValueError, match="is not pruned"):
            Native().pack(outcome, layer)
    with pytest.raises(ValueError, match="holds more"):
        Native().pack(_outcome("2:4"), layer.with_support(torch.ones(6, 16, dtype=torch.bool)))
    with pytest.raises(ValueError, match="keeps 96"):
        Native().pack(_outcome(None, 48), layer.with_support(torch.ones(6, 16, dtype=torch.bool)))
