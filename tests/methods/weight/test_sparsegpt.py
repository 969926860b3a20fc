"""SparseGPT against its equations, column by column in float64."""

import pytest
import torch
from torch import Tensor

from lilliput.methods.weight import gptq, magnitude, sparsegpt
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Target

ROWS, WIDTH = 24, 80


def _case(rows: int = ROWS, width: int = WIDTH, tokens: int = 400, seed: int = 0) -> tuple[Tensor, SiteStats]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g) * torch.exp(torch.randn(width, generator=g))
    x = torch.randn(tokens, width, generator=g) @ mix / width**0.5
    return torch.randn(rows, width, generator=g) * 0.05, SiteStats(width, tokens, gram=x.T @ x)


def _support(layer: Layer) -> Tensor:
    assert layer.support is not None
    return layer.support


def _reference(
    w: Tensor, gram: Tensor, sparsity: float, pattern: tuple[int, int] | None, scope: str, block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The algorithm as printed: H^-1 = UT U, S = w^2 / U_jj^2, e = (w_j - q) / U_jj, w_k -= e U_jk."""
    h = gram.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    work, (rows, width) = w.double().clone(), w.shape
    kept, errors, values = torch.ones_like(work), torch.zeros_like(work), torch.zeros_like(work)
    for j in range(width):
        if pattern is None and j % block == 0:
            stop = min(j + block, width)
            score = work[:, j:stop].square() / u.diagonal()[j:stop].square()
            if scope == "row":
                for row in range(rows):
                    leave = round(sparsity * stop) - round(sparsity * j)
                    kept[row, j + score[row].argsort(stable=True)[:leave]] = 0
            else:
                leave = round(sparsity * rows * stop) - round(sparsity * rows * j)
                for place in score.flatten().argsort(stable=True)[:leave].tolist():
                    kept[place // (stop - j), j + place % (stop - j)] = 0
        if pattern is not None and j % pattern[1] == 0:
            n, m = pattern
            score = work[:, j : j + m].square() / u.diagonal()[j : j + m].square()
            for row in range(rows):
                kept[row, j + score[row].argsort(stable=True)[: m - n]] = 0
        q = work[:, j] * kept[:, j]
        errors[:, j] = (work[:, j] - q) / u[j, j]
        work[:, j:] -= errors[:, j : j + 1] * u[j, j:]
        values[:, j] = q
    return kept.bool(), values, errors, u, h


@pytest.mark.parametrize(
    ("target", "scope"),
    [
        ({"sparsity": 0.5}, "block"),
        ({"sparsity": 0.73}, "row"),
        ({"pattern": "2:4"}, "block"),
        ({"pattern": "1:20"}, "row"),
    ],
)
@pytest.mark.parametrize("block", [16, 40, 128])
def test_equals_the_printed_algorithm(target: dict[str, object], scope: str, block: int) -> None:
    """The same zeros, and values to 1e-4 of the largest."""
    w, stats = _case()
    options = sparsegpt.Options.model_validate({"scope": scope, "block": block, "shrinkage": 0.0})
    layer = sparsegpt.compress(Layer("x", w), stats, Target.model_validate(target), options)
    n, _, m = str(target.get("pattern", "0:0")).partition(":")
    pattern = (int(n), int(m)) if int(m) else None
    sparsity = float(str(target.get("sparsity", 0)))
    kept, values, errors, u, h = _reference(w, stats.need("gram"), sparsity, pattern, scope, block)
    assert torch.equal(_support(layer), kept)
    torch.testing.assert_close(layer.decode().double(), values, rtol=0, atol=1e-4 * float(values.abs().max()))
    # W - What = E U, and the loss with the damped H is |E|^2
    slow = w.double() - values
    torch.testing.assert_close(slow, errors @ u, rtol=0, atol=1e-9)
    torch.testing.assert_close(((slow @ h) * slow).sum(), errors.square().sum(), rtol=1e-9, atol=0)


def test_an_empty_mask_is_the_identity() -> None:
    w, stats = _case()
    for target in (Target(sparsity=0.0), Target(pattern="4:4")):
        assert torch.equal(sparsegpt.compress(Layer("x", w), stats, target, sparsegpt.Options()).decode(), w)


@pytest.mark.parametrize("gram", [torch.eye(WIDTH) * 7.0, torch.zeros(WIDTH, WIDTH)])
def test_inputs_alike_make_it_magnitude_by_blocks_without_update(gram: Tensor) -> None:
    w, _ = _case()
    stats = SiteStats(WIDTH, 100 if bool(gram.any()) else 0, gram=gram)
    layer = sparsegpt.compress(Layer("x", w), stats, Target(sparsity=0.5), sparsegpt.Options(block=20))
    for a in range(0, WIDTH, 20):
        part = Layer("x", w[:, a : a + 20].contiguous())
        same = magnitude.compress(part, stats, Target(sparsity=0.5), magnitude.Options())
        assert torch.equal(layer.decode()[:, a : a + 20], same.decode())


def test_the_update_lowers_the_loss_of_its_mask() -> None:
    for seed in range(3):
        w, stats = _case(seed=seed)
        gram = stats.need("gram").double()
        for target in (Target(sparsity=0.5), Target(pattern="2:4")):
            layer = sparsegpt.compress(Layer("x", w), stats, target, sparsegpt.Options())
            with_update, without = (
                (((w - x).double() @ gram) * (w - x).double()).sum() for x in (layer.decode(), w * _support(layer))
            )
            assert with_update < 0.8 * without


def test_quantization_afterwards_is_gptq_on_the_original_weight() -> None:
    w, stats = _case()
    pruned = sparsegpt.compress(Layer("x", w), stats, Target(sparsity=0.5), sparsegpt.Options())
    target = Target(bits=4, group_size=16, scale_dtype="float32")
    both = gptq.compress(pruned, stats, target, gptq.Options())
    alone = gptq.compress(Layer("x", w, support=_support(pruned)), stats, target, gptq.Options())
    assert torch.equal(both.decode(), alone.decode())
    assert not bool(both.decode()[~_support(pruned)].any())


def test_an_earlier_mask_is_kept() -> None:
    w, stats = _case()
    before = torch.rand(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)) < 0.7
    layer = sparsegpt.compress(Layer("x", w, support=before), stats, Target(sparsity=0.3), sparsegpt.Options())
    assert not bool(layer.decode()[~before].any())
    assert bool((_support(layer) <= before).all())
