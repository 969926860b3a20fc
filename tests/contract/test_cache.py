"""What every codec promises: bytes as predicted, a state that is the text's, cuts, choices and a new beginning."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lilliput.errors import PlanError
from lilliput.methods import discover
from lilliput.runtime import caches
from lilliput.runtime.caches import KINDS, Entry
from lilliput.runtime.caches.codec import CacheCodec, CacheShape, CodecSpec, Incoming
from lilliput.runtime.caches.fp8 import Fp8Spec
from lilliput.runtime.caches.kivi import KiviSpec
from lilliput.runtime.caches.kvquant import KvquantSpec
from lilliput.runtime.caches.per_token import PerTokenSpec
from lilliput.runtime.caches.shifted import ShiftedSpec
from lilliput.runtime.caches.turns import Table, Turn
from lilliput.runtime.caches.window import WindowSpec
from lilliput.verbs.cache import Cache, CacheIO

SHAPE = CacheShape(heads=2, keys=16, values=8)
SPECS = [
    PerTokenSpec(16, 16, 8),
    PerTokenSpec(8, 8, 8),
    PerTokenSpec(3, 4, 4),
    PerTokenSpec(3, 2, 0, rotate=True),
    KiviSpec(2, 2, 4, 12),
    KiviSpec(3, 16, 8, 8, rotate=True),
    KiviSpec(16, 4, 8, 8),
    KvquantSpec(3, 3, 0.02, 1, turned=True),
    KvquantSpec(2, 4, 0.0, 0, turned=False),
    KvquantSpec(8, 2, 0.1, 5, turned=True),
    ShiftedSpec(4, 4, 4),
    ShiftedSpec(16, 2, 8),
    ShiftedSpec(3, 3, 0),
    WindowSpec(2, 9),
    WindowSpec(0, 64),
    Fp8Spec(),
]
NAMES = [f"{x.kind}-{n}" for n, x in enumerate(SPECS)]
Tiny = Callable[[str], Path]


def tensors(spec: CodecSpec) -> dict[str, Tensor]:
    draw, out = torch.Generator().manual_seed(3), {}
    for name, (dtype, shape) in spec.stored(SHAPE).items():
        value = torch.rand(shape, generator=draw, dtype=dtype)
        out[name] = value.sort(-1).values * 2 - 1 if name.endswith("levels") else value + 0.5
    return out


def text(tokens: int = 45, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    keys = torch.randn(batch, SHAPE.heads, tokens, SHAPE.keys, generator=draw)
    values = torch.randn(batch, SHAPE.heads, tokens, SHAPE.values, generator=draw)
    keys[..., 3] *= 9
    return keys.to(dtype), values.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return apply_rotary_pos_emb(x, x, cos, sin)[0]


def fed(spec: CodecSpec, keys: Tensor, values: Tensor, sizes: list[int], codec: CacheCodec | None = None) -> CacheCodec:
    """A codec after so many calls of so many tokens."""
    codec = spec.make(SHAPE, tensors(spec)) if codec is None else codec
    angles = torch.arange(200)[:, None] * torch.tensor([10.0**-n for n in range(SHAPE.keys // 2)])
    cos, sin = (torch.cat([f(angles)] * 2, -1)[None] for f in (torch.cos, torch.sin))
    table, start = Table(), codec.length
    for size in sizes:
        part = slice(start, start + size)
        turn = Turn(cos[:, part], sin[:, part], table, rotate) if spec.turns() else None
        codec.append(keys[:, :, part], values[:, :, part], Incoming(turn))
        start += size
    return codec


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_state_is_that_of_the_text_however_it_came(spec: CodecSpec, dtype: torch.dtype) -> None:
    keys, values = text(dtype=dtype)
    whole = fed(spec, keys, values, [45])
    ones = fed(spec, keys, values, [1] * 45)
    pieces = fed(spec, keys, values, [20, 1, 7, 17])
    assert whole.length == ones.length == pieces.length == 45
    for other in (ones, pieces):
        for a, b in zip(whole.materialise(), other.materialise(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0 if not spec.turns() else 1e-6)
        assert len(whole.tensors()) == len(other.tensors())
        for a, b in zip(whole.tensors(), other.tensors(), strict=True):
            assert a.shape == b.shape
            if not a.dtype.is_floating_point:
                assert torch.equal(a, b)
    assert whole.materialise()[0].dtype == dtype


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
@pytest.mark.parametrize("tokens", [1, 8, 12, 13, 45])
def test_bytes_are_those_predicted(spec: CodecSpec, tokens: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        keys, values = text(dtype=dtype)
        codec = fed(spec, keys, values, [tokens])
        assert codec.held_bits() == 2 * spec.size_bits(tokens, SHAPE, 8 * dtype.itemsize)
        # What is held is not a view of something larger, either.
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in codec.tensors() if x.numel()}
        assert 8 * sum(held.values()) == codec.held_bits()
    assert spec.size_bits(0, SHAPE, 16) == 0


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_rows_are_chosen_and_tokens_are_cut(spec: CodecSpec) -> None:
    keys, values = text()
    codec = fed(spec, keys, values, [30])
    codec.select(torch.tensor([1, 1, 0]))
    rows = torch.tensor([1, 1, 0])
    expected = fed(spec, keys[rows], values[rows], [30])
    for a, b in zip(codec.materialise(), expected.materialise(), strict=True):
        assert torch.equal(a, b)
    cut = fed(spec, keys, values, [30])
    cut.keep(21)
    assert cut.length == 21
    again = fed(spec, keys, values, [21])
    if spec.kind in ("kv-rtn", "wkvquant", "kvquant", "kv-fp8"):
        for a, b in zip(cut.materialise(), again.materialise(), strict=True):
            assert torch.equal(a, b)
    if spec.kind == "kivi":  # the cut chunk is kept as it was read
        before = fed(spec, keys, values, [30]).materialise()
        for a, b in zip(cut.materialise(), before, strict=True):
            torch.testing.assert_close(a, b[:, :, :21], rtol=0, atol=1e-5)
    cut.keep(0)
    assert cut.length == 0
    new = fed(spec, keys, values, [9], cut)
    for a, b in zip(new.materialise(), fed(spec, keys, values, [9]).materialise(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_an_entry_survives_json(spec: CodecSpec) -> None:
    entry = Entry(spec, ("a", "b"), "self_attn", SHAPE)
    assert caches.parsed([json.loads(json.dumps(entry.plain()))]) == (entry,)
    assert set(caches.stored([entry.plain()])) == {f"{x}.self_attn.{n}" for x in "ab" for n in spec.stored(SHAPE)}


def test_every_kind_is_tried() -> None:
    assert {x.kind for x in SPECS} == set(KINDS)


METHODS = [x for x in discover().values() if isinstance(x.spec, Cache)]


@pytest.mark.parametrize("method", METHODS, ids=lambda x: x.name)
def test_what_is_fitted_is_as_described_and_inputs_stay(method: object) -> None:
    spec = method.spec  # type: ignore[attr-defined]
    options = method.options()  # type: ignore[attr-defined]
    made = spec.codec(3, 4, options, True)
    assert made.kind in KINDS
    assert dataclasses.is_dataclass(made)
    if spec.fit is None:
        assert made.stored(SHAPE) == {}
        return
    draw = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(300, 2, n, generator=draw) for n in (SHAPE.keys, SHAPE.values))
    before = keys.clone(), values.clone()
    one, other = (spec.fit(CacheIO(SHAPE, keys, values), made, options) for _ in range(2))
    assert {name: (x.dtype, tuple(x.shape)) for name, x in one.items()} == made.stored(SHAPE)
    assert all(torch.equal(x, other[name]) for name, x in one.items())
    assert torch.equal(before[0], keys)
    assert torch.equal(before[1], values)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (PerTokenSpec(4, 4, 5), "group of 5 does not divide the 16"),
        (KiviSpec(4, 4, 8, 12), "residual of 12 tokens is no multiple of groups of 8"),
        (KiviSpec(4, 4, 0, 12), "groups of keys are of tokens"),
        (PerTokenSpec(4, 4, 0, rotate=True), "heads of 14 channels have no Hadamard"),
    ],
)
def test_what_does_not_fit_is_refused(spec: CodecSpec, words: str) -> None:
    shape = CacheShape(2, 14, 14) if "14" in words else SHAPE
    with pytest.raises(PlanError, match=words):
        spec.check(shape)


def test_a_model_runs_as_before_while_caches_are_paused(tiny: Tiny) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    ids = torch.arange(20)[None]
    entry = Entry(PerTokenSpec(2, 2, 16), ("model.layers.0",), "self_attn", CacheShape(2, 16, 16))
    with torch.no_grad():
        plain = model(ids).logits
        caches.install(model, [entry.plain()], {}.__getitem__)
        assert not torch.equal(model(ids, use_cache=True).logits, plain)
        with caches.paused(model):
            assert torch.equal(model(ids, use_cache=True).logits, plain)
        assert torch.equal(model(ids, use_cache=False).logits, plain)
