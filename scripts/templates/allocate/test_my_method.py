"""my-method against a slow version written from its equations, in float64."""

from __future__ import annotations

import pytest
import torch

from lilliput.anatomy.model import Block, Groups
from lilliput.methods.allocate.my_method import Options, allocate, score
from lilliput.target import Target
from lilliput.verbs.scores import Share
from lilliput.verbs.view import BlockIO, BlockView


def reference(weights: dict[str, torch.Tensor], sparsity: float, spread: float) -> dict[str, float]:
    """replace: your equations, as obvious as can be."""
    every = [abs(float(x)) for w in weights.values() for x in w.flatten()]
    means = {name: sum(abs(float(x)) for x in w.flatten()) / w.numel() for name, w in weights.items()}
    gaps = {name: sum(every) / len(every) - mean for name, mean in means.items()}
    return {name: sparsity + spread * gap / max(map(abs, gaps.values())) for name, gap in gaps.items()}


def test_my_method_agrees_with_the_reference_and_keeps_the_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    weights = {name: size * torch.randn(4, width, generator=draw) for name, size, width in (("a", 1, 6), ("b", 3, 10))}
    scores = score(BlockView(Block((), (), (), Groups()), weights), BlockIO({}), Options())
    budget = {name: Share(0, (4, w.shape[1]), Target(sparsity=0.6)) for name, w in weights.items()}
    sparsities = {name: target.sparsity for name, target in allocate(scores, budget, Options(spread=0.2)).items()}
    assert sparsities == pytest.approx(reference(weights, 0.6, 0.2), abs=1e-9)
    assert 24 * sparsities["a"] + 40 * sparsities["b"] == pytest.approx(64 * 0.6)
