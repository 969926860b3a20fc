"""DyLoRA: cut to a rank it is what was trained at that rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def test_an_adapter_that_is_cut_is_what_a_step_at_that_rank_trains(
    lab: Callable[..., Any], shared: Any, tmp_path: Path
) -> None:
    made = lab("dylora", target={"rank": 8}, alpha=32.0, cut=3)
    made.steps(0, 1, 2, 3)
    made.student.adapter.width = 3
    with torch.no_grad():
        stock = shared.loaded(made.folder, made.save(tmp_path / "adapter"))(shared.ids()).logits
    torch.testing.assert_close(stock, made.logits(), rtol=0, atol=1e-4)
    made.student.adapter.width = 8
    assert float((stock - made.logits()).abs().max()) > 1e-3


def test_only_the_drawn_pair_has_gradients(lab: Callable[..., Any]) -> None:
    made = lab("dylora", target={"rank": 8}, only=True)
    adapter = made.student.adapter
    adapter.width = 3
    for down, up in adapter.factors().values():
        down.grad, up.grad = torch.ones_like(down), torch.ones_like(up)
    adapter.after_backward()
    down, up = next(iter(adapter.factors().values()))
    assert down.grad is not None
    assert up.grad is not None
    assert not bool(down.grad[:2].any())
    assert not bool(up.grad[:, :2].any())
    assert bool(down.grad[2].all())


def test_ranks_are_drawn_between_the_least_and_the_whole(lab: Callable[..., Any]) -> None:
    adapter = lab("dylora", target={"rank": 8}, least=3).student.adapter
    torch.manual_seed(0)
    seen = set()
    for _ in range(200):
        adapter.step(0.0)
        seen.add(adapter.width)
    assert seen == set(range(3, 9))
