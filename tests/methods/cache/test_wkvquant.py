from __future__ import annotations

import torch

from lilliput.methods import get
from lilliput.runtime.caches.codec import CacheShape, Incoming
from lilliput.runtime.caches.layer import CompressedLayer
from lilliput.runtime.caches.per_token import PerTokenSpec
from lilliput.runtime.caches.shifted import ShiftedSpec
from lilliput.verbs.cache import CacheIO

SHAPE = CacheShape(2, 16, 8)


def text(tokens: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, tokens, 16, generator=draw) * 3 + 1, torch.randn(2, 2, tokens, 8, generator=draw)


def static(spec: ShiftedSpec, shift: float, scale: float) -> dict[str, torch.Tensor]:
    return {n: torch.full(s, shift if "shift" in n else scale) for n, (_, s) in spec.stored(SHAPE).items()}


def test_without_shifts_it_is_plain_rounding() -> None:
    keys, values = text()
    spec, plain = ShiftedSpec(3, 4, 8), PerTokenSpec(3, 4, 8)
    ours, other = spec.make(SHAPE, static(spec, 0.0, 1.0)), plain.make(SHAPE, {})
    for codec in (ours, other):
        codec.append(keys, values, Incoming())
    for a, b in zip(ours.materialise(), other.materialise(), strict=True):
        assert torch.equal(a, b)
    assert spec.size_bits(77, SHAPE, 16) == plain.size_bits(77, SHAPE, 16)


def test_only_the_past_is_rounded() -> None:
    keys, values = text()
    spec = ShiftedSpec(2, 2, 8)
    layer = CompressedLayer(spec.make(SHAPE, static(spec, 0.5, 2.0)))
    assert torch.equal(layer.update(keys[:, :, :9], values[:, :, :9])[0], keys[:, :, :9])
    seen = layer.update(keys[:, :, 9:11], values[:, :, 9:11])
    assert torch.equal(seen[0][:, :, 9:], keys[:, :, 9:11])
    assert not torch.equal(seen[0][:, :, :9], keys[:, :, :9])


def test_shifts_and_scales_are_those_of_the_extremes() -> None:
    draw = torch.Generator().manual_seed(1)
    keys, values = torch.randn(60, 2, 16, generator=draw), torch.randn(60, 2, 8, generator=draw)
    keys[:, 1, 3] = 5.0  # a channel that never changes
    method = get("wkvquant")
    options = method.options()
    spec = method.spec.codec(4, 8, options, True)  # type: ignore[attr-defined]
    found = method.spec.fit(CacheIO(SHAPE, keys, values), spec, options)  # type: ignore[attr-defined]
    for side, x in (("key", keys), ("value", values)):
        for head in range(2):
            for c in range(x.shape[2]):
                column = x[:, head, c].double()
                half = float(column.max() - column.min()) / 2
                assert abs(float(found[f"{side}_cache_scale"][head, c]) - (half or 1.0)) < 1e-6
                middle = float(column.max() + column.min()) / 2
                assert abs(float(found[f"{side}_cache_shift"][head, c]) - middle) < 1e-6


def test_channels_of_different_ranges_are_better_off() -> None:
    keys, values = text(64)
    keys = keys * torch.logspace(-1, 2, 16)
    flat = keys.transpose(1, 2).flatten(0, 1), values.transpose(1, 2).flatten(0, 1)
    method = get("wkvquant")
    options = method.options()
    spec = method.spec.codec(4, 8, options, True)  # type: ignore[attr-defined]
    fitted = method.spec.fit(CacheIO(SHAPE, *flat), spec, options)  # type: ignore[attr-defined]
    errors = []
    for codec in (spec.make(SHAPE, fitted), PerTokenSpec(4, 4, 8).make(SHAPE, {})):
        codec.append(keys, values, Incoming())
        gap = (codec.materialise()[0] - keys)[..., :8]
        errors.append(float((gap.square().mean((0, 1, 2)) / keys[..., :8].square().mean((0, 1, 2))).mean()))
    assert errors[0] < 0.5 * errors[1]
