from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lilliput.errors import PlanError
from lilliput.methods import get
from lilliput.methods.cache import kvquant
from lilliput.runtime.caches.codec import CacheShape, Incoming
from lilliput.runtime.caches.kvquant import CENTRE, HALF, KvquantSpec, normalised, value_ranges
from lilliput.runtime.caches.turns import Table, Turn
from lilliput.verbs.cache import CacheIO

SHAPE = CacheShape(2, 16, 8)
WIDE = 32  # entries of a token's keys


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return apply_rotary_pos_emb(x, x, cos, sin)[0]


def angles(tokens: int) -> tuple[Tensor, Tensor]:
    turned = torch.arange(tokens)[:, None] * torch.tensor([10.0 ** (-n / 2) for n in range(8)])
    return torch.cat([turned.cos()] * 2, -1)[None], torch.cat([turned.sin()] * 2, -1)[None]


def text(tokens: int = 30) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, tokens, 16, generator=draw) * 2 + 1, torch.randn(2, 2, tokens, 8, generator=draw)


def levels(bits: int) -> Tensor:
    draw = torch.Generator().manual_seed(bits)
    return (torch.rand(2, 1 << bits, generator=draw) * 2 - 1).sort(-1).values


def static(bits: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(5)
    return {
        CENTRE: torch.rand(2, 16, generator=draw),
        HALF: torch.rand(2, 16, generator=draw) * 2 + 1,
        "key_cache_levels": levels(bits),
        "value_cache_levels": levels(bits),
    }


def nearest(z: float, table: Tensor) -> float:
    z = min(1.0, max(-1.0, z))
    code = min(range(table.shape[1]), key=lambda n: (abs(float(table[0, n]) - z), n))
    return float(table[1, code])


def expected(keys: Tensor, values: Tensor, fixed: dict[str, Tensor], share: float, sinks: int) -> tuple[Tensor, Tensor]:
    """What is read, by the equations, float64, entry by entry; keys are those before the rotation."""
    k, v = keys.double().clone(), values.double().clone()
    for b in range(len(keys)):
        for t in range(keys.shape[2]):
            if t < sinks:
                continue
            entries = [(h, c) for h in range(2) for c in range(16)]
            z = {
                (h, c): (float(keys[b, h, t, c]) - float(fixed[CENTRE][h, c])) / float(fixed[HALF][h, c])
                for h, c in entries
            }
            apart = sorted(entries, key=lambda e: -abs(z[e]))[: math.ceil(share * 32)]
            for h, c in entries:
                if (h, c) not in apart:
                    level = nearest(z[h, c], fixed["key_cache_levels"])
                    k[b, h, t, c] = level * float(fixed[HALF][h, c]) + float(fixed[CENTRE][h, c])
            own = [(h, c) for h in range(2) for c in range(8)]
            x = {(h, c): float(values[b, h, t, c]) for h, c in own}
            mean = sum(x.values()) / len(x)
            apart = sorted(own, key=lambda e: -abs(x[e] - mean))[: math.ceil(share * 16)]
            rest = [x[e] for e in own if e not in apart]
            half = float(torch.tensor((max(rest) - min(rest)) / 2).half())
            centre = float(torch.tensor((max(rest) + min(rest)) / 2).half())
            for h, c in own:
                if (h, c) not in apart:
                    v[b, h, t, c] = nearest((x[h, c] - centre) / half, fixed["value_cache_levels"]) * half + centre
    return k, v


@pytest.mark.parametrize(("bits", "share", "sinks"), [(3, 0.0, 0), (2, 0.05, 1), (4, 0.2, 3)])
def test_it_is_what_the_equations_say(bits: int, share: float, sinks: int) -> None:
    keys, values = text()
    cos, sin = angles(30)
    codec = KvquantSpec(bits, bits, share, sinks, turned=True).make(SHAPE, static(bits))
    codec.append(rotate(keys, cos, sin), values, Incoming(Turn(cos, sin, Table(), rotate)))
    k, v = expected(keys, values, static(bits), share, sinks)
    found = codec.materialise()
    torch.testing.assert_close(found[0].double(), rotate(k, cos.double(), sin.double()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1].double(), v, rtol=1e-5, atol=1e-5)


def test_many_levels_are_the_cache_after_its_rotation() -> None:
    """With 8 bits and evenly spaced levels over a wide range, keys are those that came, up to half a step."""
    keys, values = text()
    cos, sin = angles(30)
    fixed = {CENTRE: torch.zeros(2, 16), HALF: torch.full((2, 16), 12.0)}
    fixed |= {f"{side}_cache_levels": torch.linspace(-1, 1, 256).expand(2, -1) for side in ("key", "value")}
    codec = KvquantSpec(8, 8, 0.0, 0, turned=True).make(SHAPE, fixed)
    came = rotate(keys, cos, sin)
    codec.append(came, values, Incoming(Turn(cos, sin, Table(), rotate)))
    assert (codec.materialise()[0] - came).abs().max() < 1.5 * 12 / 255
    assert (codec.materialise()[1] - values).abs().max() < 0.02


def test_even_levels_without_outliers_are_rounding_by_channel() -> None:
    keys, values = text(200)
    method = get("kvquant")
    options = method.parse({"levels": "uniform", "outliers": 0.0, "sinks": 0, "q_norm": False})
    spec = method.spec.codec(4, 0, options, False)  # type: ignore[attr-defined]
    io = CacheIO(SHAPE, keys.transpose(1, 2).flatten(0, 1), values.transpose(1, 2).flatten(0, 1))
    codec = spec.make(SHAPE, method.spec.fit(io, spec, options))  # type: ignore[attr-defined]
    codec.append(keys, values, Incoming())
    flat = keys.transpose(1, 2).flatten(0, 1).double()
    low, high = flat.amin(0)[:, None], flat.amax(0)[:, None]
    step = (high - low) / 15
    wanted = ((keys.double() - low) / step).round() * step + low
    gap = (codec.materialise()[0].double() - wanted).abs()
    assert (gap > 1e-4).float().mean() < 1e-3  # ties aside


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_outliers_are_exact_and_do_not_widen_ranges(share: float) -> None:
    keys, values = text(100)
    keys[:, 0, ::33, 2] = 90.0
    values[:, 1, ::5, 3] = -70.0
    method = get("kvquant")
    options = method.parse({"outliers": share, "sinks": 0})
    spec = method.spec.codec(4, 0, options, False)  # type: ignore[attr-defined]
    io = CacheIO(SHAPE, keys.transpose(1, 2).flatten(0, 1), values.transpose(1, 2).flatten(0, 1))
    fixed = method.spec.fit(io, spec, options)  # type: ignore[attr-defined]
    codec = spec.make(SHAPE, fixed)
    codec.append(keys, values, Incoming())
    found = codec.materialise()
    if share:
        assert float(fixed[HALF][0, 2]) < 10
        assert bool((found[0][:, 0, ::33, 2] == 90.0).all())
        assert bool((found[1][:, 1, ::5, 3] == -70.0).all())
        assert (found[1] - values).square().mean() < 0.01
    else:
        assert float(fixed[HALF][0, 2]) > 40
        assert (found[1] - values).square().mean() > 0.01


def test_ranges_leave_their_share_out_on_both_sides() -> None:
    x = torch.arange(1000.0)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))][:, None]
    centre, half = kvquant.ranges(x, 0.02)
    assert float(centre) == 499.5
    assert float(half) == (989 - 10) / 2
    centre, half = kvquant.ranges(x, 0.0)
    assert float(half) == 499.5


def test_q_norm_keeps_mean_and_deviation() -> None:
    z = torch.randn(20000, generator=torch.Generator().manual_seed(0)).mul(0.3).add(0.1).clamp(-1, 1)
    plain, normed = (kvquant.table(z, 2, "uniform", q_norm=x) for x in (False, True))
    assert torch.equal(plain[0], plain[1])
    assert torch.equal(normed[0], plain[0])
    codes = torch.bucketize(z, (plain[0, 1:] + plain[0, :-1]) / 2)
    read = normed[1][codes]
    assert abs(float(read.mean() - z.mean())) < 1e-4
    assert abs(float(read.std() - z.std())) < 1e-4


def test_k_means_is_no_worse_than_even_levels() -> None:
    z = torch.randn(5000, generator=torch.Generator().manual_seed(0)).mul(0.2).clamp(-1, 1)
    errors = []
    for name in ("kmeans", "uniform"):
        table = kvquant.table(z, 3, name, q_norm=False)
        errors.append(float((table[1][torch.bucketize(z, (table[0, 1:] + table[0, :-1]) / 2)] - z).square().mean()))
    assert errors[0] < 0.5 * errors[1]


def test_weighted_levels_are_means_of_what_they_stand_for() -> None:
    """Lloyd's condition in float64, level by level; and the weighted error is what falls."""
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(4000, generator=draw).mul(0.3).clamp(-1, 1)
    w = torch.rand(4000, generator=draw) ** 4 * (1 + 50 * (z > 0.5))
    plain, weighed = (kvquant.table(z, 3, "kmeans", False, x) for x in (None, w))
    assert torch.equal(kvquant.table(z, 3, "kmeans", False, torch.full_like(z, 7.0)), plain)
    errors = []
    for levels in (plain, weighed):
        codes = torch.bucketize(z, (levels[0, 1:] + levels[0, :-1]) / 2)
        errors.append(float((w * (levels[0][codes] - z).square()).sum()))
    assert errors[1] < 0.9 * errors[0]
    for n in range(8):
        own = codes == n
        mean = float((w[own].double() * z[own].double()).sum() / w[own].double().sum())
        assert abs(float(weighed[0, n]) - mean) < 2e-3
    outside = torch.cat([z, torch.full((10,), 3.0)])
    loud = torch.cat([w, torch.full((10,), 1e9)])
    assert torch.equal(kvquant.table(outside, 3, "kmeans", False, loud), weighed)  # those are stored apart


def test_squares_weigh_what_they_are_of() -> None:
    """Keys and values in their order, without those that are stored apart."""
    keys, values = (x.transpose(1, 2).flatten(0, 1) for x in text(100))
    method = get("kvquant")
    options = method.parse({"outliers": 0.1, "weigh": "fisher"})
    spec = method.spec.codec(3, 0, options, False)  # type: ignore[attr-defined]
    draw = torch.Generator().manual_seed(1)
    squares = [torch.rand(x.shape, generator=draw) ** 6 for x in (keys, values)]
    fixed = method.spec.fit(CacheIO(SHAPE, keys, values, *squares), spec, options)  # type: ignore[attr-defined]
    alike = method.spec.fit(CacheIO(SHAPE, keys, values), spec, options)  # type: ignore[attr-defined]
    assert torch.equal(fixed[CENTRE], alike[CENTRE])
    flat = [x.flatten(1) for x in (keys, values)]
    apart, low, high = value_ranges(flat[1], 2)
    z = [normalised(flat[0], fixed[CENTRE].flatten(), fixed[HALF].flatten()), normalised(flat[1], low, high)]
    use = [z[0].abs() <= 1, torch.ones_like(z[1], dtype=torch.bool).scatter_(1, apart, False)]
    for side, x, weights, own in zip(("key", "value"), z, squares, use, strict=True):
        errors = []
        for found in (fixed, alike):
            table = found[f"{side}_cache_levels"]
            codes = torch.bucketize(x[own], (table[0, 1:] + table[0, :-1]) / 2)
            errors.append(float((weights.flatten(1)[own] * (table[0][codes] - x[own]).square()).sum()))
        assert errors[0] < errors[1]
    with pytest.raises(PlanError, match="leave one of them out"):
        method.spec.codec(3, 0, method.parse({"levels": "uniform", "weigh": "fisher"}), False)  # type: ignore[attr-defined]


def test_bytes_are_those_of_the_formula() -> None:
    spec = KvquantSpec(3, 2, 0.05, 2, turned=True)
    token = 8 * 12 + 2 * (16 + 16) + 8 * 4 + 1 * (16 + 16) + 32 + 32
    assert spec.size_bits(100, SHAPE, 16) == 100 * token + 2 * 48 * 16 + 32
