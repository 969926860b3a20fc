"""Methods that add parts, and binary, ternary and sign grids, on odd shapes and broken inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput import methods
from lilliput.errors import LilliputError
from lilliput.parts import scheme
from lilliput.parts.layer import Layer
from lilliput.parts.linear import LinearSpec, decode
from lilliput.stats import fold
from lilliput.stats.site import SiteStats
from lilliput.target import Target

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "spqr": ({"bits": 3}, {"share": 0.07}),
    "spqr all": ({"bits": 2}, {"share": 1.0}),
    "owq": ({"bits": 3}, {"extra": 2.0}),
    "rex": ({"bits": 2}, {"terms": 3, "share": 0.4}),
    "lorc": ({"rank": 1}, {}),
    "lorc int8": ({"rank": 1}, {"factors": "int8"}),
    "bcq": ({"bits": 2, "format": "binary"}, {}),
    "bcq greedy": ({"bits": 3, "format": "binary"}, {"start": "greedy", "sweep": False}),
    "ternary": ({"format": "ternary"}, {}),
    "svid": ({"format": "sign"}, {}),
}


def _stats(width: int, tokens: int, rank: int, dead: int, seed: int) -> SiteStats:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, rank, generator=g) @ torch.randn(rank, width, generator=g)
    x[:, :dead] = 0
    return fold.finish(fold.update(fold.init(width, fold.NAMES), x))


def _run(case: str, w: torch.Tensor, stats: SiteStats, group: int | str) -> tuple[Layer, scheme.Scheme]:
    target, options = CASES[case]
    method = methods.get(case.split()[0])
    parsed, wanted = method.parse(options), Target.model_validate({"group_size": group, **target})
    planned = method.scheme(wanted, parsed, *w.shape)
    return method.spec.run(Layer("x", w), stats, wanted, parsed), planned


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    case=st.sampled_from(list(CASES)),
    rows=st.integers(1, 9),
    width=st.integers(1, 50),
    group=st.one_of(st.integers(1, 60), st.just("channel")),
    tokens=st.integers(0, 40),
    rank=st.integers(1, 5),
    dead=st.integers(0, 3),
    constant=st.booleans(),
)
def test_any_shape_and_any_gram_matrix(
    case: str, rows: int, width: int, group: int | str, tokens: int, rank: int, dead: int, constant: bool
) -> None:
    """Ragged groups, single columns, rank-deficient and empty Gram matrices, dead channels, constant and zero rows."""
    stats = _stats(width, tokens, rank, min(dead, width), seed=rows)
    w = torch.randn(rows, width, generator=torch.Generator().manual_seed(width))
    if constant:
        w[0] = 0.25
        w[-1] = 0
    out, planned = _run(case, w, stats, group)
    assert scheme.of(out) == planned
    back = out.decode()
    assert bool(torch.isfinite(back).all())
    assert float(back.abs().max()) <= 4 * float(w.abs().max()) + 1e-6
    tensors = {"x.weight" + n: t for n, t in planned.pack(out).items()}
    spec = LinearSpec("x", "x", rows, width, scheme.from_plain(planned.plain()))
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == spec.describe()
    assert torch.equal(decode(spec, tensors.__getitem__), back)
    assert planned.size_bits(rows, width) == sum(part.bits() for part in out.parts)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(case: str, value: float) -> None:
    w, stats = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), _stats(16, 40, 16, 0, 0)
    broken = w.clone()
    broken[1, 3] = value
    with pytest.raises(LilliputError, match="NaN or infini"):
        _run(case, broken, stats, 8)
    method = methods.get(case.split()[0])
    if not method.spec.needs:
        return
    ill = stats.scaled(torch.ones(16))
    for field in ("gram", "square"):
        ill.need(field).view(-1)[0] = value
    with pytest.raises(LilliputError, match="NaN or infini"):
        _run(case, w, ill, 8)


@pytest.mark.parametrize("case", CASES)
def test_rows_that_are_all_equal(case: str) -> None:
    w = torch.randn(1, 24, generator=torch.Generator().manual_seed(3)).expand(5, 24).contiguous()
    out, _ = _run(case, w, _stats(24, 200, 24, 0, 1), "channel")
    assert float((out.decode() - w).norm()) < float(w.norm())
