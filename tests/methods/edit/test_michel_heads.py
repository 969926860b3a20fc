"""Importance of gates: the whole model's loss, differentiated by numbers that multiply heads and channels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lilliput import api
from lilliput.methods.edit import michel_heads
from lilliput.progress import Quiet
from lilliput.run.journal import Work
from lilliput.verbs.edits import EditIO, EditView

Tiny = Callable[[str], Path]
RUN: dict[str, Any] = {"samples": 3, "tokens": 32, "device": "cpu", "dtype": "float32", "progress": Quiet()}


def test_a_block_has_norm_1_and_sizes_are_means_over_samples(toy: Any) -> None:
    slopes = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    view: Any = EditView(toy.model.anatomy().blocks[0], lambda name: torch.empty(0))
    got = michel_heads.score(view, EditIO({}, {}, {}, gates={"heads": slopes}), michel_heads.Options())["heads"]
    size = [sum(abs(float(slopes[n, h])) for n in range(7)) / 7 for h in range(5)]
    norm = sum(x * x for x in size) ** 0.5
    torch.testing.assert_close(torch.tensor(got), torch.tensor([x / norm for x in size]))
    none = michel_heads.score(view, EditIO({}, {}, {}, gates={"heads": slopes * 0}), michel_heads.Options())["heads"]
    assert none == (0.0,) * 5


def test_a_head_that_no_logit_depends_on_leaves_and_nothing_changes(
    tiny: Tiny, tmp_path: Path, monkeypatch: Any
) -> None:
    """Its columns of o are 0, so its gate has no slope; the model that is written gives the same logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    idle = [1, 0, 1, 0]
    with torch.no_grad():
        for head, layer in zip(idle, model.model.layers, strict=True):
            layer.self_attn.o_proj.weight[:, 32 * head : 32 * head + 32] = 0.0
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(tmp_path / "model")
    noted: list[dict[str, Any]] = []
    note = Work.note
    monkeypatch.setattr(Work, "note", lambda self, record: (noted.append(record), note(self, record))[1])
    recipe = "steps:\n  - {method: michel-heads, options: {ratio: 0.5}}\n"
    api.compress(tmp_path / "model", tmp_path / "out", recipe=recipe, eval_windows=0, **RUN)
    scores = {x["block"]: x["scores"]["heads"] for x in noted if x["kind"] == "edit-score"}
    assert [scores[n].index(min(scores[n])) for n in range(4)] == idle
    assert all(min(x) == 0.0 and abs(max(x) - 1.0) < 1e-12 for x in scores.values())
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(smaller(ids).logits, model(ids).logits, rtol=1e-5, atol=2e-5)
