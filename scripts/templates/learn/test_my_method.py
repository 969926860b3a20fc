"""my-method against a slow version written from its equations, in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from lilliput.methods.learn.my_method import Options, learn

WIDTH = 5


def reference(x: list[float], v: list[float]) -> list[float]:
    """replace: your equations, as obvious as can be. Now: x seen in a mirror across v."""
    length = sum(a * a for a in v)
    along = sum(a * b for a, b in zip(x, v, strict=True)) / length
    return [a - 2 * along * b for a, b in zip(x, v, strict=True)]


def test_my_method_agrees_with_the_reference() -> None:
    model: Any = SimpleNamespace(skeleton=SimpleNamespace(hidden_size=WIDTH))
    (fold,) = learn(model, None, {}, Options(seed=3))
    v = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for row in torch.randn(4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)):
        expected = torch.tensor(reference(row.tolist(), v.tolist()), dtype=torch.float64)
        torch.testing.assert_close(row @ fold.matrix, expected)
    torch.testing.assert_close(fold.matrix.T @ fold.matrix, torch.eye(WIDTH, dtype=torch.float64))
