"""SqueezeLLM's two parts against a slow version, and its limits."""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.methods.weight import squeezellm
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.sparse import SparsePart
from lilliput.stats.site import SiteStats
from lilliput.target import Target

EMPTY = SiteStats(64, 0)


def _case(rows: int = 16, width: int = 64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=g) * 0.05, torch.rand(rows, width, generator=g) ** 8


def _target(bits: int = 3, scale_dtype: str = "float32") -> Target:
    return Target(format="codebook", bits=bits, group_size="channel", scale_dtype=scale_dtype)  # type: ignore[arg-type]


def _run(w: Tensor, fisher: Tensor, target: Target, **options: float) -> tuple[Layer, QuantizedPart, SparsePart]:
    out = squeezellm.compress(Layer("x", w, fisher=fisher), EMPTY, target, squeezellm.Options(**options))  # type: ignore[arg-type]
    dense, apart = out.parts
    assert isinstance(dense, QuantizedPart)
    assert isinstance(apart, SparsePart)
    return out, dense, apart


def _lloyd(values: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    """Slow k-means of one row from given levels."""
    levels = levels.double().clone()
    for _ in range(50):
        label = (values.double()[:, None] - levels).abs().argmin(1)
        for k in range(len(levels)):
            h = weights.double()[label == k]
            if float(h.sum()) > 0:
                levels[k] = (h * values.double()[label == k]).sum() / h.sum()
    return levels


def test_the_parts_are_those_of_the_equations() -> None:
    w, fisher = _case()
    out, dense, apart = _run(w, fisher, _target(), sensitive=0.01, outliers=0.02)
    count, both = round(0.01 * w.numel()), round(0.03 * w.numel())
    first = set(fisher.flatten().argsort(descending=True)[:count].tolist())
    rest = [i for i in w.abs().flatten().argsort(descending=True).tolist() if i not in first]
    expected = torch.zeros(w.numel(), dtype=torch.bool)
    expected[[*first, *rest[: both - count]]] = True
    expected = expected.view_as(w)
    assert len(apart.values) == both
    assert torch.equal(apart.decode() != 0, expected)
    torch.testing.assert_close(out.decode()[expected], w[expected], rtol=0, atol=1e-7)
    masked = fisher.masked_fill(expected, 0.0)
    for row in range(len(w)):
        levels = dense.grid.levels[row, 0]
        torch.testing.assert_close(_lloyd(w[row], masked[row], levels), levels.double(), rtol=1e-5, atol=1e-7)
        nearest = levels[(w[row][:, None] - levels).abs().argmin(1)]
        assert torch.equal(dense.decode()[row], nearest)


def test_constant_fisher_is_plain_k_means_and_nought_counts_alike() -> None:
    w, _ = _case()
    ones = _run(w, torch.ones_like(w), _target(), sensitive=0.0)[0].decode()
    assert torch.equal(ones, _run(w, torch.zeros_like(w), _target(), sensitive=0.0)[0].decode())
    plain = squeezellm.compress(Layer("x", w), EMPTY, _target(), squeezellm.Options(weigh="none", sensitive=0.0))
    assert torch.equal(ones, plain.decode())


def test_everything_sparse_or_few_values_are_exact() -> None:
    w, fisher = _case()
    whole = _run(w, fisher, _target(), outliers=1.0)[0].decode()
    torch.testing.assert_close(whole, w, rtol=0, atol=1e-7)
    half = _run(w, fisher, _target(scale_dtype="float16"), outliers=1.0)[0].decode()
    torch.testing.assert_close(half, w, rtol=0, atol=2e-5)
    few = torch.tensor([-1.0, 0.5, 0.25, 2.0])[torch.randint(0, 4, w.shape, generator=torch.Generator().manual_seed(1))]
    assert torch.equal(_run(few, fisher, _target(2))[0].decode(), few)


def test_both_parts_lower_the_weighted_error() -> None:
    w, fisher = _case()

    def error(layer: Layer) -> float:
        return float(((w - layer.decode()).square() * fisher).sum())

    def run(**options: object) -> Layer:
        chosen = squeezellm.Options(**options)  # type: ignore[arg-type]
        return squeezellm.compress(Layer("x", w, fisher=fisher), EMPTY, _target(), chosen)

    bare = run(sensitive=0.0, outliers=0.0)
    assert len(bare.parts) == 1
    assert error(run(sensitive=0.02, outliers=0.0)) < 0.9 * error(bare)
    assert error(bare) < 0.8 * error(run(sensitive=0.0, outliers=0.0, weigh="none"))


def test_without_gradients_inputs_weigh() -> None:
    w, _ = _case()
    square = torch.exp(2 * torch.randn(64, generator=torch.Generator().manual_seed(2)))
    stats = SiteStats(64, 10, square=square)

    def error(weigh: str) -> float:
        out = squeezellm.compress(Layer("x", w), stats, _target(), squeezellm.Options(weigh=weigh))  # type: ignore[arg-type]
        return float(((w - out.decode()).square() * square).sum())

    assert error("gram") < 0.7 * error("none")
    assert squeezellm.needs(squeezellm.Options()) == ("fisher",)
    assert squeezellm.needs(squeezellm.Options(weigh="gram")) == ("square",)


def test_sizes_are_fixed() -> None:
    o = squeezellm.Options(sensitive=0.01, outliers=0.02)
    scheme = squeezellm.scheme(_target(scale_dtype="float16"), o, 16, 64)
    assert scheme.size_bits(16, 64) == 16 * 64 * 3 + 16 * 8 * 16 + 31 * 32 + 17 * 32
