"""Bottlenecks: loaded again they compute what was trained; skipped blocks, weights that stay 0."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lilliput
from lilliput.errors import PlanError


def test_a_loaded_model_computes_what_was_trained(lab: Callable[..., Any], shared: Any, tmp_path: Path) -> None:
    made = lab("adapter", skip=1, keep=0.5, width=8)
    made.steps(0, 1, 2, 3)
    model = shared.opened(made.folder)
    lilliput.use_adapter(model, made.save(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(model(shared.ids()).logits, made.logits(), rtol=0, atol=1e-4)
    networks = made.student.adapter._named
    assert sorted({name.split(".")[2] for name in networks}) == ["1", "2", "3"]
    assert {name.rsplit(".", 1)[-1] for name in networks} == {"o_proj", "down_proj"}
    for x in networks.values():
        assert float((x.down.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
        assert 0.3 < float((x.up.weight == 0).float().mean()) < 0.7


def test_what_cannot_be_is_named(
    shared: Any, coded: Callable[..., Path], lab: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="has 4 blocks, and 4 are skipped"):
        shared.planned(coded(), "adapter", skip=4)
    with pytest.raises(PlanError, match="is no bottleneck"):
        shared.planned(coded(), "adapter", width=65)
    other = lab("prompt-tuning", length=2).save(tmp_path / "other")
    with pytest.raises(PlanError, match="no change of weights and biases alone"):
        lilliput.use_adapter(shared.opened(coded()), other)
