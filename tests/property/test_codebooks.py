"""Learned tables on shapes that nobody plans for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput import methods
from lilliput.errors import LilliputError, PlanError
from lilliput.parts.layer import Layer
from lilliput.stats import fold
from lilliput.stats.site import SiteStats
from lilliput.target import Target

CODEBOOKS = sorted(n for n, m in methods.discover().items() if m.spec.formats == ("codebook",))


def _stats(width: int, tokens: int, rank: int, dead: int, seed: int) -> SiteStats:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, rank, generator=g) @ torch.randn(rank, width, generator=g)
    x[:, :dead] = 0
    return fold.finish(fold.update(fold.init(width, fold.NAMES), x))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(CODEBOOKS),
    rows=st.integers(1, 9),
    width=st.integers(1, 50),
    group=st.one_of(st.integers(1, 60), st.sampled_from(["channel", "tensor"])),
    bits=st.integers(2, 8),
    tokens=st.integers(0, 40),
    rank=st.integers(1, 5),
    dead=st.integers(0, 3),
    constant=st.booleans(),
    holes=st.booleans(),
    weigh=st.sampled_from(["none", "gram", "pivot", "fisher"]),
)
def test_codebooks_of_any_shape(
    name: str,
    rows: int,
    width: int,
    group: int | str,
    bits: int,
    tokens: int,
    rank: int,
    dead: int,
    constant: bool,
    holes: bool,
    weigh: str,
) -> None:
    """Ragged groups, more levels than weights (which the plan refuses), dead channels, few tokens, rows of equals."""
    g = torch.Generator().manual_seed(width)
    stats = _stats(width, tokens, rank, min(dead, width), seed=rows)
    w = torch.randn(rows, width, generator=g)
    if constant:
        w[0] = 0.25
        w[-1] = 0
    method = methods.get(name)
    group = "tensor" if name == "gobo" else group
    known = "weigh" in method.options.model_fields and (name != "squeezellm" or weigh != "pivot")
    options = method.parse({"weigh": weigh} if known else {})
    target = Target(format="codebook", bits=bits, group_size=group)  # type: ignore[arg-type]
    layer = Layer("x", w, fisher=torch.rand(w.shape, generator=g) ** 8 * (torch.rand(w.shape, generator=g) < 0.8))
    if holes:
        layer = layer.with_support(torch.rand(w.shape, generator=g) < 0.7)
    out = method.spec.run(layer, stats, target, options)
    back = out.decode()
    assert bool(torch.isfinite(back).all())
    assert float(back.abs().max()) <= 3 * float(w.abs().max()) + 1e-6
    units = 1 if group == "tensor" else rows * (1 if group == "channel" else -(-width // int(group)))
    assert out.parts[0].bits() == rows * width * bits + units * 2**bits * 16
    if layer.support is not None:
        assert not bool(back[~layer.support].any())
    size = {"tensor": w.numel(), "channel": width}.get(str(group)) or min(int(group), width)
    try:
        method.scheme(target, options, rows, width)
    except PlanError:
        assert 2**bits > size
    else:
        assert 2**bits <= size


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_codebooks_refuse_what_is_no_number(name: str, value: float) -> None:
    method = methods.get(name)
    target = Target(format="codebook", bits=2, group_size="tensor" if name == "gobo" else "channel")
    g = torch.Generator().manual_seed(0)
    w, stats = torch.randn(4, 16, generator=g), _stats(16, 40, 16, 0, 0)
    fisher, broken = torch.rand(4, 16, generator=g), w.clone()
    broken[1, 3] = value
    with pytest.raises(LilliputError, match="NaN or infini"):
        method.spec.run(Layer("x", broken, fisher=fisher), stats, target, method.parse({}))
    if "fisher" in method.spec.needs:
        bad = fisher.clone()
        bad[0, 0] = value
        with pytest.raises(LilliputError, match=r"Fisher information of x contains NaN or infini"):
            method.spec.run(Layer("x", w, fisher=bad), stats, target, method.parse({"weigh": "fisher"}))
        ill = stats.scaled(torch.ones(16))
        for field in ("gram", "square"):
            ill.need(field).view(-1)[0] = value
        with pytest.raises(LilliputError, match="NaN or infini"):
            method.spec.run(Layer("x", w, fisher=fisher), ill, target, method.parse({"weigh": "gram"}))
