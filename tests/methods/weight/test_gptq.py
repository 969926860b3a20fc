"""GPTQ against its equations, column by column in float64."""

import itertools

import pytest
import torch
from torch import Tensor

from lilliput.algebra import lattice, obs
from lilliput.methods.weight import gptq, rtn
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.stats.site import SiteStats
from lilliput.target import Target


def _case(rows: int = 24, width: int = 80, tokens: int = 400, seed: int = 0) -> tuple[Tensor, SiteStats]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g) * torch.exp(torch.randn(width, generator=g))
    x = torch.randn(tokens, width, generator=g) @ mix / width**0.5
    return torch.randn(rows, width, generator=g) * 0.05, SiteStats(width, tokens, gram=x.T @ x)


def _target(bits: int = 4, group: int | str = 16, symmetric: bool = False) -> Target:
    return Target(bits=bits, group_size=group, symmetric=symmetric, scale_dtype="float32")


def _part(layer: Layer) -> QuantizedPart:
    part = layer.parts[0]
    assert isinstance(part, QuantizedPart)
    return part


def _reference(
    w: Tensor,
    gram: Tensor,
    damping: float,
    order: list[int],
    step: Tensor,
    zero: Tensor,
    bits: int,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The algorithm as printed: H^-1 = UT U; q = Q(w_j), e = (w_j - q) / U_jj, w_k -= e U_jk."""
    h = gram.double()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    h = h[order][:, order]
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    work = w.double()[:, order].clone()
    step, zero = step.double()[:, order], zero.double()[:, order]
    codes, errors, values = torch.zeros_like(work), torch.zeros_like(work), torch.zeros_like(work)
    for j in range(len(h)):
        code = (torch.round(work[:, j] / step[:, j]) + zero[:, j]).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        q = (code - zero[:, j]) * step[:, j]
        if mask is not None:
            q = torch.where(mask[:, order[j]], q, 0.0)
            code = torch.where(mask[:, order[j]], code, zero[:, j])
        errors[:, j] = (work[:, j] - q) / u[j, j]
        work[:, j:] -= errors[:, j : j + 1] * u[j, j:]
        codes[:, j], values[:, j] = code, q
    back = torch.empty(len(h), dtype=torch.int64)
    back[order] = torch.arange(len(h))
    return codes[:, back].to(torch.int8), values[:, back], errors, u, h


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, 16, False), (3, 24, True), (2, "channel", False), (4, "tensor", True)]
)
def test_equals_the_printed_algorithm(bits: int, group: int | str, symmetric: bool, act_order: bool) -> None:
    """Same codes but for ties of rounding: at most 2 in 1,000 differ, and the loss agrees to 1e-3."""
    w, stats = _case()
    target = _target(bits, group, symmetric)
    layer = gptq.compress(Layer("x", w), stats, target, gptq.Options(act_order=act_order, shrinkage=0.0))
    part = _part(layer)
    gram = stats.need("gram")
    order = gram.diagonal().argsort(descending=True, stable=True).tolist() if act_order else list(range(80))
    step, zero = (x.expand(24, 80) for x in part.format.expand(part.grid, 80))
    codes, values, errors, u, h = _reference(w, gram, 0.01, order, step, zero, bits)
    assert float((codes != part.codes).double().mean()) <= 2e-3
    miss, slow = (w - layer.decode()).double(), w.double() - values
    ours, theirs = (((d @ gram.double()) * d).sum() for d in (miss, slow))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
    # W - What = E U, and the loss with the damped H is |E|^2
    torch.testing.assert_close(slow[:, order], errors @ u, rtol=0, atol=1e-9)
    torch.testing.assert_close(((slow[:, order] @ h) * slow[:, order]).sum(), errors.square().sum(), rtol=1e-9, atol=0)


def test_equals_the_printed_algorithm_on_a_support() -> None:
    w, stats = _case(seed=3)
    mask = torch.rand(24, 80, generator=torch.Generator().manual_seed(1)) < 0.5
    for symmetric in (True, False):
        layer = gptq.compress(
            Layer("x", w, support=mask), stats, _target(4, 16, symmetric), gptq.Options(act_order=False, shrinkage=0.0)
        )
        part = _part(layer)
        step, zero = part.format.expand(part.grid, 80)
        codes, *_ = _reference(w, stats.need("gram"), 0.01, list(range(80)), step, zero, 4, mask)
        assert float((codes != part.codes).double().mean()) <= 2e-3
        assert bool((layer.decode()[~mask] == 0).all())


@pytest.mark.parametrize("refine", [0, 3])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_gram_matrix_of_equal_channels_gives_rtn_bit_for_bit(act_order: bool, refine: int) -> None:
    w, _ = _case()
    stats = SiteStats(80, 100, gram=torch.eye(80) * 7.0, square=torch.full((80,), 7.0))
    for symmetric in (True, False):
        target = _target(3, 24, symmetric)
        options = gptq.Options(act_order=act_order, shrinkage=0.0, refine=refine, rescale=False)
        a = _part(gptq.compress(Layer("x", w), stats, target, options))
        b = _part(rtn.compress(Layer("x", w), stats, target, rtn.Options()))
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.grid.scale, b.grid.scale)


def test_without_tokens_it_is_rtn() -> None:
    w, _ = _case()
    stats = SiteStats(80, 0, gram=torch.zeros(80, 80), square=torch.zeros(80))
    a = _part(gptq.compress(Layer("x", w), stats, _target(), gptq.Options(shrinkage=0.0, refine=2, rescale=False)))
    b = _part(rtn.compress(Layer("x", w), stats, _target(), rtn.Options()))
    assert torch.equal(a.codes, b.codes)


@pytest.mark.parametrize(
    "options", [{}, {"act_order": False}, {"act_order": False, "static_groups": False}, {"refine": 2}]
)
def test_the_block_size_changes_speed_only(options: dict[str, object]) -> None:
    w, stats = _case(width=150, rows=16)
    results = [
        gptq.compress(Layer("x", w), stats, _target(), gptq.Options.model_validate({**options, "block": block}))
        for block in (1, 7, 64, 128, 1000)
    ]
    for other in results[1:]:
        assert float((_part(other).codes != _part(results[0]).codes).double().mean()) <= 2e-3


def test_the_factor_is_the_inverse_of_the_printed_one() -> None:
    """U^-1 to 1e-5 of its largest entry."""
    _, stats = _case()
    gram = stats.need("gram")
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    factor = obs.factorize(gram, 0.01, order)
    h = gram.double()[order][:, order] + 0.01 * gram.double().diagonal().mean() * torch.eye(80, dtype=torch.float64)
    inverse = torch.linalg.inv(torch.linalg.cholesky(torch.linalg.inv(h), upper=True))
    ours = factor.coupling.double().triu(1) * factor.pivot.double() + torch.diag(factor.pivot.double())
    torch.testing.assert_close(ours, inverse, rtol=0, atol=1e-5 * float(inverse.abs().max()))


def test_every_refining_pass_lowers_the_loss() -> None:
    for seed in range(3):
        w, stats = _case(seed=seed)
        gram = stats.need("gram")
        damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(80)
        for symmetric, group in ((True, 16), (False, 24), (True, "channel"), (False, "tensor")):
            losses = []
            for passes in range(4):
                target = _target(3, group, symmetric)
                layer = gptq.compress(Layer("x", w), stats, target, gptq.Options(shrinkage=0.0, refine=passes))
                losses.append(lattice.loss(damped, (w - layer.decode()).T))
            assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(losses))
            assert losses[1] < losses[0]


def test_a_converged_refinement_is_a_local_optimum() -> None:
    """No single code can be changed for a lower loss (to 1e-4 of it), checked by trying all changes by one."""
    w, stats = _case(rows=4, width=32)
    gram = stats.need("gram").double()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    layer = gptq.compress(Layer("x", w), stats, _target(4, 16, False), gptq.Options(shrinkage=0.0, refine=50))
    part = _part(layer)

    def losses(codes: Tensor) -> Tensor:
        d = (w - part.format.decode(codes, part.grid)).double()
        return ((d @ damped) * d).sum(1)

    base = losses(part.codes)
    for j in range(32):
        for move in (-1, 1):
            tried = part.codes.clone()
            tried[:, j] = (tried[:, j].int() + move).clamp(-8, 7).to(torch.int8)
            assert bool((losses(tried) >= base * (1 - 1e-4)).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_rtn_and_its_options_pay(bits: int) -> None:
    w, stats = _case(rows=64, width=128, tokens=2000, seed=9)
    stats = SiteStats(128, stats.count, gram=stats.gram, square=stats.need("gram").diagonal())
    gram = stats.need("gram")

    def loss(layer: Layer) -> float:
        return lattice.loss(gram, (w - layer.decode()).T)

    target = _target(bits, 32, True)
    nearest = loss(rtn.compress(Layer("x", w), stats, target, rtn.Options()))
    plain = loss(gptq.compress(Layer("x", w), stats, target, gptq.Options(act_order=False, shrinkage=0.0)))
    ordered = loss(gptq.compress(Layer("x", w), stats, target, gptq.Options(shrinkage=0.0)))
    refined = loss(gptq.compress(Layer("x", w), stats, target, gptq.Options(shrinkage=0.0, refine=3)))
    signed = loss(gptq.compress(Layer("x", w), stats, target, gptq.Options(shrinkage=0.0, refine=3, signed_scale=True)))
    assert nearest > plain > ordered > refined > signed


def test_shrinkage_is_the_printed_algorithm_on_shrunken_correlations() -> None:
    w, stats = _case()
    shrunken = stats.need("gram").clone()
    shrunken.diagonal().mul_(1.3)
    other = SiteStats(stats.width, stats.count, gram=shrunken)

    def codes(of: SiteStats, shrinkage: float, damping: float) -> Tensor:
        options = gptq.Options(shrinkage=shrinkage, damping=damping, search="minmax")
        return _part(gptq.compress(Layer("x", w), of, _target(), options)).codes

    # Damping is a share of the plain diagonal's mean in both.
    expected = codes(other, 0.0, 0.01 / 1.3)
    assert (codes(stats, 0.3, 0.01) != expected).double().mean() < 2e-3
    assert (codes(stats, 0.0, 0.01) != expected).double().mean() > 2e-2
