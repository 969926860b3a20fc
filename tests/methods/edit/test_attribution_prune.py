"""Attribution: what a channel adds to the log-probability of the text, against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lilliput import api
from lilliput.methods.edit import attribution_prune
from lilliput.progress import Quiet
from lilliput.run import editing
from lilliput.run.journal import Work
from lilliput.verbs.edits import EditIO, EditView

Tiny = Callable[[str], Path]
RUN: dict[str, Any] = {"samples": 3, "tokens": 32, "device": "cpu", "dtype": "float32", "progress": Quiet()}


def test_a_score_is_minus_the_sum_of_the_slopes(toy: Any) -> None:
    slopes = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    view: Any = EditView(toy.model.anatomy().blocks[0], lambda name: torch.empty(0))
    io = EditIO({}, {}, {}, gates={"channels.0": slopes})
    got = attribution_prune.score(view, io, attribution_prune.Options())["channels.0"]
    for j in range(5):
        assert got[j] == pytest.approx(-sum(float(slopes[n, j]) for n in range(7)))


def test_it_is_what_a_gate_changes_of_the_log_probability(tiny: Tiny, tmp_path: Path, monkeypatch: Any) -> None:
    noted: list[dict[str, Any]] = []
    seen: list[Tensor] = []
    note, looked_at = Work.note, editing._looked_at

    def watched(*given: Any) -> Tensor:
        seen.append(looked_at(*given))
        return seen[-1]

    monkeypatch.setattr(Work, "note", lambda self, record: (noted.append(record), note(self, record))[1])
    monkeypatch.setattr(editing, "_looked_at", watched)
    recipe = "steps:\n  - {method: attribution-prune, options: {ratio: 0.1}}\n"
    api.compress(tiny("llama"), tmp_path / "out", recipe=recipe, eval_windows=0, **RUN)
    scores = {x["block"]: x["scores"]["channels.0"] for x in noted if x["kind"] == "edit-score"}
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float64).eval()

    def gained(block: int, channel: int, gate: float) -> float:
        weight = model.model.layers[block].mlp.down_proj.weight
        with torch.no_grad():
            was = weight[:, channel].clone()
            weight[:, channel] *= gate
            losses = [torch.nn.functional.cross_entropy(model(x[None]).logits[0, :-1], x[1:]) for x in seen[0]]
            weight[:, channel] = was
        return -float(sum(losses))

    for block, channel in ((0, 3), (2, 11)):
        slope = (gained(block, channel, 1.01) - gained(block, channel, 0.99)) / 0.02
        assert scores[block][channel] == pytest.approx(slope, rel=1e-3)
