"""my-method against a slow version written from its equations, in float64."""

from __future__ import annotations

import torch

from lilliput.anatomy.model import Groups
from lilliput.methods.edit.my_method import Options, edit
from lilliput.stats import fold

WIDTH = 6


def reference(inputs: torch.Tensor) -> list[int]:
    """replace: your equations, as obvious as can be. Now: which channel comes first, second, ..."""
    energy = [sum(float(x) ** 2 for x in inputs[:, j]) for j in range(WIDTH)]
    return sorted(range(WIDTH), key=lambda j: (-energy[j], j))


def test_my_method_agrees_with_the_reference() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(20, WIDTH, generator=draw).double() for _ in range(3)]
    stats = {str(n): fold.finish(fold.update(fold.init(WIDTH, ("gram",)), x.float())) for n, x in enumerate(inputs)}
    plan = edit([Groups(), Groups()], stats, Options())
    assert len(plan.bases) == 3
    for x, basis in zip(inputs, plan.bases, strict=True):
        torch.testing.assert_close(x @ basis, x[:, reference(x)], rtol=0, atol=0)
