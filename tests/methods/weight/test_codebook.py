"""The sweep over codebooks against its equations in float64, and what refits promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput.formats import groups
from lilliput.methods.weight import codebook, gptq
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.stats.site import SiteStats
from lilliput.target import Target


def _case(rows: int = 24, width: int = 80, tokens: int = 400, seed: int = 0) -> tuple[Tensor, SiteStats]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g) * torch.exp(torch.randn(width, generator=g))
    x = torch.randn(tokens, width, generator=g) @ mix / width**0.5
    gram = x.T @ x
    return torch.randn(rows, width, generator=g) * 0.05, SiteStats(width, tokens, gram=gram, square=gram.diagonal())


def _target(bits: int, group: int | str = "channel") -> Target:
    return Target(format="codebook", bits=bits, group_size=group, scale_dtype="float32")  # type: ignore[arg-type]


def _damped(gram: Tensor, shrinkage: float, damping: float = 0.01) -> Tensor:
    h = gram.double()
    return h + shrinkage * h.diagonal().diag() + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def _loss(w: Tensor, out: Layer, h: Tensor) -> Tensor:
    d = (w - out.decode()).double()
    return ((d @ h) * d).sum(1)


def _sweep(w: Tensor, h: Tensor, order: list[int], table: Tensor, group: list[int]) -> Tensor:
    """As printed: H^-1 = UT U; q = the nearest level, e = (w_j - q) / U_jj, w_k -= e U_jk."""
    u = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    work, values = w.double()[:, order].clone(), torch.zeros_like(w, dtype=torch.float64)
    for j, column in enumerate(order):
        levels = table[:, group[column]].double()
        q = levels.gather(1, (levels - work[:, j : j + 1]).abs().argmin(1, keepdim=True)).squeeze(1)
        work[:, j:] -= ((work[:, j] - q) / u[j, j])[:, None] * u[j, j:]
        values[:, column] = q
    return values


@pytest.mark.parametrize(("bits", "group"), [(2, "channel"), (3, 24), (4, "tensor"), (8, 80)])
def test_equals_the_printed_sweep(bits: int, group: int | str) -> None:
    """Same levels but for ties: at most 2 in 1,000 differ."""
    w, stats = _case()
    gram = stats.need("gram")
    layer = codebook.compress(Layer("x", w), stats, _target(bits, group), codebook.Options(refits=0))
    (part,) = layer.parts
    assert isinstance(part, QuantizedPart)
    order = gram.diagonal().argsort(descending=True, stable=True).tolist()
    table = part.format.expand(part.grid, 80).levels.expand(24, -1, -1)  # type: ignore[attr-defined]
    own = groups.index(80, part.format.group_size).tolist()  # type: ignore[attr-defined]
    want = _sweep(w, _damped(gram, 0.2), order, table, own)
    assert float((layer.decode().double() != want).double().mean()) <= 2e-3


@pytest.mark.parametrize(("bits", "group"), [(2, "channel"), (3, 24), (3, "channel"), (4, 40)])
def test_refits_never_raise_the_loss_of_any_row(bits: int, group: int | str) -> None:
    w, stats = _case(seed=1)
    h = _damped(stats.need("gram"), 0.2)
    before = None
    for refits in range(4):
        now = _loss(
            w, codebook.compress(Layer("x", w), stats, _target(bits, group), codebook.Options(refits=refits)), h
        )
        if before is not None:
            assert bool((now <= before * (1 + 1e-4)).all())
        before = now
    first = _loss(w, codebook.compress(Layer("x", w), stats, _target(bits, group), codebook.Options(refits=0)), h)
    assert before is not None
    assert float(before.sum()) < 0.97 * float(first.sum())


def test_a_refit_is_the_least_squares_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many steps of conjugate gradients as levels, the table is that of the normal equations."""
    from lilliput.algebra import levels as sweep

    monkeypatch.setattr(sweep, "_STEPS", 4)
    w, stats = _case(rows=5)
    h = _damped(stats.need("gram"), 0.2)
    layer = codebook.compress(Layer("x", w), stats, _target(2), codebook.Options(refits=0))
    (part,) = layer.parts
    assert isinstance(part, QuantizedPart)
    values, deviation = layer.decode().T.contiguous(), (w - layer.decode()).T.contiguous()
    group = torch.zeros(80, dtype=torch.int64)
    table = sweep._refit(values, deviation, h.float(), part.grid.levels, group, None, torch.float32)
    for row in range(5):
        z = torch.nn.functional.one_hot(part.codes[row].long() + 2, 4).double()
        want = torch.linalg.solve(z.T @ h @ z, z.T @ h @ w[row].double())
        torch.testing.assert_close(table[row, 0].double(), want.sort().values, rtol=1e-4, atol=1e-6)


def test_uncorrelated_inputs_round_to_nearest() -> None:
    w, _ = _case()
    eye = torch.eye(80) * 3
    stats = SiteStats(80, 100, gram=eye, square=eye.diagonal())
    swept = codebook.compress(Layer("x", w), stats, _target(3), codebook.Options(refits=0))
    plain = codebook.compress(Layer("x", w), stats, _target(3), codebook.Options(sweep=False, weigh="gram"))
    assert torch.equal(swept.decode(), plain.decode())


def test_beats_gptq_with_fewer_bits() -> None:
    w, stats = _case(rows=48, width=256, tokens=1500)
    target = Target(format="codebook", bits=3, group_size="channel")
    ours = codebook.compress(Layer("x", w), stats, target, codebook.Options())
    theirs = gptq.compress(Layer("x", w), stats, Target(bits=3, group_size=32, symmetric=False), gptq.Options())
    assert ours.parts[0].bits() < 0.99 * theirs.parts[0].bits()
    assert float(_loss(w, ours, stats.need("gram").double()).sum()) < float(
        _loss(w, theirs, stats.need("gram").double()).sum()
    )


def test_weights_of_k_means() -> None:
    """Each kind of weight has the least error under itself."""
    w, stats = _case()
    fisher = torch.rand(w.shape, generator=torch.Generator().manual_seed(3)) ** 6
    by = {"none": torch.ones_like(w), "gram": stats.second_moment().expand(w.shape), "fisher": fisher}
    outs = {
        k: codebook.compress(Layer("x", w, fisher=fisher), stats, _target(3), codebook.Options(weigh=k, sweep=False))  # type: ignore[arg-type]
        for k in by
    }
    for kind, weights in by.items():
        errors = {k: float(((w - out.decode()).square() * weights).sum()) for k, out in outs.items()}
        assert min(errors, key=lambda k: errors[k]) == kind
    assert codebook.needs(codebook.Options(weigh="fisher", sweep=False)) == ("fisher",)
    assert codebook.needs(codebook.Options(weigh="none", sweep=False)) == ()
    assert codebook.needs(codebook.Options()) == ("gram",)
