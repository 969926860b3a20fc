from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput.methods import get
from lilliput.runtime.caches.codec import CacheShape, Incoming
from lilliput.runtime.caches.kivi import KiviSpec
from lilliput.runtime.caches.layer import CompressedLayer
from lilliput.runtime.caches.per_token import PerTokenSpec

SHAPE = CacheShape(2, 16, 8)
BITS, GROUP, RESIDUAL = 2, 4, 12


def group(values: list[float], bits: int) -> list[float]:
    low = float(torch.tensor(min(values)).half())
    step = float(torch.tensor((max(values) - min(values)) / (2**bits - 1), dtype=torch.float32).half())
    return [low + step * (0 if step == 0 else min(2**bits - 1, max(0, round((x - low) / step)))) for x in values]


def expected(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The state after all tokens by KIVI's rules, float64, token by token."""
    keys, values = keys.double().clone(), values.double().clone()
    batch, heads, tokens, width = keys.shape
    chunks = tokens - tokens % RESIDUAL
    for b in range(batch):
        for h in range(heads):
            for c in range(width):
                for start in range(0, chunks, GROUP):
                    part = [float(x) for x in keys[b, h, start : start + GROUP, c]]
                    keys[b, h, start : start + GROUP, c] = torch.tensor(group(part, BITS), dtype=torch.float64)
            for t in range(max(0, tokens - RESIDUAL)):
                for start in range(0, values.shape[-1], GROUP):
                    part = [float(x) for x in values[b, h, t, start : start + GROUP]]
                    values[b, h, t, start : start + GROUP] = torch.tensor(group(part, BITS), dtype=torch.float64)
    return keys, values


def text(tokens: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    return torch.randn(2, 2, tokens, 16, generator=draw) * 3 + 1, torch.randn(2, 2, tokens, 8, generator=draw)


@pytest.mark.parametrize("tokens", [5, 12, 13, 24, 31])
def test_the_state_is_what_the_rules_say(tokens: int) -> None:
    keys, values = text(tokens)
    codec = KiviSpec(BITS, BITS, GROUP, RESIDUAL).make(SHAPE, {})
    codec.append(keys, values, Incoming())
    for found, wanted in zip(codec.materialise(), expected(keys, values), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


def test_short_texts_are_exact_and_a_call_sees_itself_as_it_is() -> None:
    keys, values = text(40)
    layer = CompressedLayer(KiviSpec(BITS, BITS, GROUP, RESIDUAL).make(SHAPE, {}))
    seen = layer.update(keys[:, :, :30], values[:, :, :30])
    assert torch.equal(seen[0], keys[:, :, :30])
    seen = layer.update(keys[:, :, 30:31], values[:, :, 30:31])
    past = expected(keys[:, :, :30], values[:, :, :30])
    torch.testing.assert_close(seen[0][:, :, :30].double(), past[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(seen[1][:, :, :30].double(), past[1], rtol=1e-6, atol=1e-6)
    assert torch.equal(seen[0][:, :, 30:], keys[:, :, 30:31])
    short = CompressedLayer(KiviSpec(BITS, BITS, GROUP, RESIDUAL).make(SHAPE, {}))
    for t in range(RESIDUAL):
        seen = short.update(keys[:, :, t : t + 1], values[:, :, t : t + 1])
        assert torch.equal(seen[0], keys[:, :, : t + 1])
        assert torch.equal(seen[1], values[:, :, : t + 1])


def test_keys_with_large_channels_are_better_off_than_by_token() -> None:
    keys, values = text(48)
    keys[..., 3] += 40
    keys[..., 9] -= 25
    errors = []
    for spec in (KiviSpec(2, 2, 8, 16), PerTokenSpec(2, 2, 8)):
        codec = spec.make(SHAPE, {})
        codec.append(keys, values, Incoming())
        errors.append(float((codec.materialise()[0] - keys).norm()))
    assert errors[0] < 0.3 * errors[1]


def test_bytes_are_those_of_the_formula() -> None:
    spec, tokens, item = KiviSpec(2, 4, 4, 12), 31, 16
    keys = 2 * (24 * 16 * 2 + 24 // 4 * 16 * 32 + 7 * 16 * item)
    values = 2 * (19 * (8 * 4 + 2 * 32) + 12 * 8 * item)
    assert spec.size_bits(tokens, SHAPE, item) == keys + values


def test_options_reach_the_codec() -> None:
    method = get("kivi")
    spec = method.spec.codec(2, 32, method.parse({"residual": 64, "value_bits": 3}), False)  # type: ignore[attr-defined]
    assert spec == KiviSpec(2, 3, 32, 64)


@pytest.mark.parametrize("cuts", [(31,), (1, 30), (2, 1, 13, 15), (1,) * 31])
def test_sinks_stay_plain_and_the_rest_is_as_without_them(cuts: tuple[int, ...]) -> None:
    keys, values = text(31)
    spec = KiviSpec(BITS, BITS, GROUP, RESIDUAL, sinks=3)
    codec = spec.make(SHAPE, {})
    for a, b in zip(keys.split(cuts, 2), values.split(cuts, 2), strict=True):  # type: ignore[arg-type]
        codec.append(a, b, Incoming())
    rest = expected(keys[:, :, 3:], values[:, :, 3:])
    for found, whole, wanted in zip(codec.materialise(), (keys, values), rest, strict=True):
        assert torch.equal(found[:, :, :3], whole[:, :, :3])
        torch.testing.assert_close(found[:, :, 3:].double(), wanted, rtol=1e-6, atol=1e-6)
    assert codec.held_bits() == 2 * spec.size_bits(31, SHAPE, 32)
    codec.keep(2)
    assert torch.equal(codec.materialise()[0], keys[:, :, :2])
    codec.append(keys[:, :, 2:20], values[:, :, 2:20], Incoming())
    torch.testing.assert_close(
        codec.materialise()[0][:, :, 3:].double(),
        expected(keys[:, :, 3:20], values[:, :, 3:20])[0],
        rtol=1e-6,
        atol=1e-6,
    )
