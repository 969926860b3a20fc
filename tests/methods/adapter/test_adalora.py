"""AdaLoRA: the ranks that are left are as many as were asked for, and what is masked is gone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def test_as_many_ranks_are_left_as_were_asked_for(lab: Callable[..., Any], tmp_path: Path) -> None:
    made = lab("adalora", target={"rank": 2}, steps=8)
    made.steps(*range(8))
    adapter = made.student.adapter
    layers = adapter.layers(__import__("peft").tuners.adalora.AdaLoraLayer)
    tensors = load_file(made.save(tmp_path / "adapter") / "adapter_model.safetensors")
    left = 0
    for name, layer in layers.items():
        weight = layer.get_delta_weight("default").detach()
        kept = len(tensors[f"base_model.model.{name}.lora_A"])
        own = int((layer.lora_E["default"] != 0).sum())
        assert kept == max(own, 1)
        assert int(torch.linalg.matrix_rank(weight.double(), rtol=1e-5)) <= own
        left += own
    assert left == 2 * len(layers)


def test_the_penalty_is_that_of_the_paper(lab: Callable[..., Any]) -> None:
    adapter = lab("adalora", target={"rank": 2}, orthogonal=0.25).student.adapter
    terms = []
    for layer in adapter.layers(__import__("peft").tuners.adalora.AdaLoraLayer).values():
        q, p = layer.lora_A["default"].double(), layer.lora_B["default"].double()
        eye = torch.eye(len(q), dtype=torch.float64)
        terms += [(q @ q.T - eye).norm() ** 2, (p.T @ p - eye).norm() ** 2]
    torch.testing.assert_close(
        float(adapter.penalty().detach()), 0.25 * float(sum(terms).detach()) / len(terms), rtol=1e-5, atol=0
    )
