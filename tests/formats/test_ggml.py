"""ggml's types: their bytes against the `gguf` package, their scales against slow, obvious searches."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor

from lilliput import api
from lilliput.errors import LilliputError, PlanError, SourceError
from lilliput.formats import known
from lilliput.formats.ggml import GgmlFormat, GgmlGrid
from lilliput.formats.ggml_bytes import KINDS
from lilliput.methods.weight import gptq, rtn
from lilliput.parts.layer import Layer
from lilliput.progress import Quiet
from lilliput.stats.site import SiteStats
from lilliput.target import Target

Tiny = Callable[[str], Path]
NAMES = tuple(KINDS)
ROOM: dict[str, Any] = {"samples": 2, "tokens": 32, "device": "cpu", "dtype": "float32"}


def _weight(rows: int = 6, width: int = 512, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=g) * torch.exp(torch.randn(rows, 1, generator=g)) * 0.02


def _values(name: str, packed: Tensor, rows: int) -> Tensor:
    return torch.from_numpy(dequantize(packed.view(rows, -1).numpy(), GGMLQuantizationType[name.upper()]))


def _error(name: str, w: Tensor, grid: GgmlGrid, h: Tensor | None = None) -> float:
    form = GgmlFormat(name)
    miss = (form.decode(form.encode(w, grid), grid) - w).double().square()
    return float((miss if h is None else miss * h).sum())


@pytest.mark.parametrize("name", NAMES)
def test_the_payload_is_ggml_blocks_and_decodes_to_the_same_bits(name: str) -> None:
    form, w = GgmlFormat(name), _weight()
    grid = form.fit(w)
    codes = form.encode(w, grid)
    packed = form.pack(codes, grid)[""]
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]]
    assert packed.shape == form.stored(6, 512)[""][1] == (6 * 512 // block * size,)
    assert form.size_bits(6, 512) == 8 * packed.numel()
    assert torch.equal(_values(name, packed, 6), form.decode(codes, grid))


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_are_read_as_gguf_reads_them(name: str) -> None:
    """Codes, scales and offsets that no fit would choose, and the same bytes again."""
    form, g = GgmlFormat(name), torch.Generator().manual_seed(1)
    grid = form.fit(_weight())
    codes = torch.randint(form.kind.lowest, form.kind.highest + 1, (6, 512), generator=g, dtype=torch.int8)
    d = torch.randn(grid.d.shape, generator=g).half()
    m = None if grid.m is None else torch.randn(grid.m.shape, generator=g).half()
    low, high = form.kind.scales or (0, 0)
    drawn = [
        None if x is None else torch.randint(min(low, 0), high + 1, x.shape, generator=g, dtype=torch.int16)
        for x in (grid.scales, grid.minima)
    ]
    other = GgmlGrid(d, m, *drawn)
    packed = form.pack(codes, other)[""]
    assert torch.equal(_values(name, packed, 6), form.decode(codes, other))
    some, own = form.unpack({"": packed}.__getitem__, 6, 512, 2, 5)
    assert torch.equal(some, codes[2:5])
    assert torch.equal(form.pack(some, own)[""], packed.view(6, -1)[2:5].reshape(-1))


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_the_nearest(name: str) -> None:
    form, w = GgmlFormat(name), _weight(2, 256)
    grid = form.fit(w)
    every = range(form.kind.lowest, form.kind.highest + 1)
    values = torch.stack([form.decode(torch.full((2, 256), i, dtype=torch.int8), grid) for i in every])
    least = (values - w).abs().amin(0)
    assert torch.allclose((form.decode(form.encode(w, grid), grid) - w).abs(), least, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "bound"), [("q4_0", 1.01), ("q5_0", 1.03), ("q8_0", 1.15), ("iq4_nl", 1.02), ("tq2_0", 1.01)]
)
def test_scales_are_near_the_best_of_a_fine_list(name: str, bound: float) -> None:
    """Every scale of a fine list of each sign, for each group alone."""
    form = GgmlFormat(name)
    w = _weight(4, form.kind.block, 2)
    h = torch.exp(torch.randn(form.kind.block, generator=torch.Generator().manual_seed(3)))
    levels = torch.tensor([float(x) for x in form.kind.table or range(form.kind.lowest, form.kind.highest + 1)])
    least = torch.full((4,), float("inf"))
    peak = w.abs().amax(1) / levels.abs().max()
    for factor, sign in itertools.product(torch.linspace(0.2, 1.3, 300).tolist(), (1, -1)):
        scale = (peak * factor * sign).half().float()
        miss = (w.unsqueeze(-1) - scale.view(-1, 1, 1) * levels).square().amin(-1)
        least = torch.minimum(least, (miss * h).sum(1))
    assert _error(name, w, form.fit(w, importance=h), h) <= bound * float(least.sum())


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"])
def test_super_blocks_come_near_groups_with_scales_of_their_own(name: str) -> None:
    """The bound: every group by itself with float32 scale and offset, by a slow search."""
    form, w = GgmlFormat(name), _weight(2, 512, 4)
    groups = w.view(-1, form.group_size)
    levels = torch.tensor([float(x) for x in form.kind.table or range(form.kind.lowest, form.kind.highest + 1)])
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    peak = groups.abs().amax(1, keepdim=True)
    least = torch.full((len(groups),), float("inf"))
    shares = torch.linspace(0.5, 1.1, 13).tolist()
    if form.kind.offset:
        for a, b in itertools.product(shares, shares):
            offset = (low * a).clamp(max=0.0)
            values = offset + (high * b - offset) / levels[-1] * levels
            least = torch.minimum(least, (groups.unsqueeze(-1) - values.unsqueeze(1)).square().amin(-1).sum(1))
    else:
        for a, end in itertools.product(torch.linspace(0.5, 1.1, 100).tolist(), (levels[0], levels[-1])):
            for sign in (1, -1):
                values = sign * peak * a / end * levels
                least = torch.minimum(least, (groups.unsqueeze(-1) - values.unsqueeze(1)).square().amin(-1).sum(1))
    assert _error(name, w, form.fit(w)) <= 1.12 * float(least.sum())


@pytest.mark.parametrize("name", NAMES)
def test_a_search_is_never_worse_than_covering_the_range(name: str) -> None:
    form, w = GgmlFormat(name), _weight(8, 512, 5)
    h = torch.exp(2 * torch.randn(512, generator=torch.Generator().manual_seed(6)))
    cover = _error(name, w, form.fit(w, search="minmax"), h)
    assert _error(name, w, form.fit(w, importance=h), h) < cover
    assert _error(name, w, form.fit(w, importance=h), h) <= _error(name, w, form.fit(w), h)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0"])
def test_a_search_beats_the_quantizer_of_the_gguf_package(name: str) -> None:
    w = _weight(8, 512, 7)
    theirs = _values(name, torch.from_numpy(quantize(w.numpy(), GGMLQuantizationType[name.upper()]).copy()), 8)
    assert _error(name, w, GgmlFormat(name).fit(w)) < 0.95 * float((theirs - w).double().square().sum())


@pytest.mark.parametrize("name", NAMES)
def test_zeros_equal_weights_and_dead_inputs(name: str) -> None:
    form = GgmlFormat(name)
    w = torch.zeros(3, 256)
    w[1] = 0.5
    w[2, 7] = -3.0
    h = torch.ones(256)
    h[:32] = 0.0
    for search, importance in (("mse", h), ("mse", None), ("minmax", None)):
        grid = form.fit(w, importance=importance, search=search)
        out = form.decode(form.encode(w, grid), grid)
        assert bool(torch.isfinite(out).all())
        assert float(out[0].abs().max()) < 1e-4
        assert float((out[1] - 0.5).abs().max()) < 0.04


def test_what_is_no_number_and_too_large_is_refused() -> None:
    w = _weight()
    w[0, 3] = float("nan")
    with pytest.raises(LilliputError, match="NaN"):
        GgmlFormat("q4_k").fit(w)
    with pytest.raises(LilliputError, match="float16"):
        GgmlFormat("q8_0").fit(_weight() * 1e10)
    with pytest.raises(SourceError, match="newer"):
        known.from_plain({"kind": "ggml", "type": "q9_z"})


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_rounds_to_it_and_beats_nearest(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(256, 256, generator=g) * torch.exp(torch.randn(256, generator=g))
    x = torch.randn(900, 256, generator=g) @ mix / 16
    gram, w = x.T @ x, _weight(12, 256, 8)
    stats, target = SiteStats(256, 900, gram=gram, square=gram.diagonal()), known.completed(Target(format=name))

    def loss(layer: Layer) -> float:
        miss = (w - layer.decode()).double()
        return float(((miss @ gram.double()) * miss).sum())

    swept = gptq.compress(Layer("x", w), stats, target, gptq.Options())
    assert loss(swept) < 0.8 * loss(rtn.compress(Layer("x", w), stats, target, rtn.Options()))
    even = SiteStats(256, 900, gram=torch.eye(256), square=torch.ones(256))
    plain = rtn.compress(Layer("x", w), even, target, rtn.Options(steps=30)).decode()
    same = gptq.compress(Layer("x", w), even, target, gptq.Options()).decode()
    assert float(((plain - same).abs() > 1e-6).float().mean()) < 1e-3


@pytest.mark.parametrize(("target", "said"), [
    ({"format": "q4_k", "bits": 3}, "by its name"),
    ({"format": "q4_k", "group_size": 64}, "groups of 32 by its nature"),
    ({"format": "q4_1", "symmetric": False}, "says by its name"),
    ({"format": "q6_k", "scale_dtype": "float32"}, "scales of its own"),
])  # fmt: skip
def test_settings_that_a_type_does_not_have(target: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        known.completed(Target.model_validate(target))


def test_narrow_rows_fall_back_as_in_llama_cpp() -> None:
    falls = {"q2_k": "iq4_nl", "q3_k": "iq4_nl", "iq4_xs": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0",
             "tq1_0": "q4_0", "tq2_0": "q4_0"}  # fmt: skip
    for name in NAMES:
        target = known.completed(Target(format=name))
        assert known.fitting(target, 512) == target
        assert known.fitting(target, 576).format == falls.get(name, name)


def test_a_folder_of_blocks_opens_and_the_plan_names_what_falls_back(tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    recipe = """steps:
  - {method: awq, options: {rows: 16, grid: 2}, where: {include: [model.layers.0.*]}}
  - {method: gptq, target: {format: q4_k}, where: {include: [model.layers.0.*]}}
  - {method: rtn, target: {format: q6_k}, where: {include: [embed, lm_head]}}
"""
    done = api.compress(tiny("wide"), tmp_path / "out", recipe=recipe, eval_windows=0, progress=Quiet(), **ROOM)
    assert {x.scheme.describe() for x in done.plan.compressed} == {"q4_k"}
    assert {x.scheme.describe() for x in done.plan.resolved.tables} == {"q6_k"}
    assert done.plan.bytes == sum(x.stat().st_size for x in done.out.glob("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(done.out)
    assert bool(torch.isfinite(model(torch.arange(8)[None]).logits).all())
    narrow = api.plan(tiny("llama"), recipe=recipe, **ROOM)
    assert {x.scheme.describe() for x in narrow.compressed} == {"q5_0"}
    assert {x.scheme.describe() for x in narrow.resolved.tables} == {"q8_0"}
    assert any(x.startswith("q5_0 instead of q4_k") and "(7 in all)" in x for x in narrow.notes)


def test_a_width_that_no_block_divides_is_refused() -> None:
    with pytest.raises(PlanError, match="multiple of 32 inputs, and one has 48"):
        GgmlFormat("q4_0").check(4, 48)


def test_values_are_rounded_once() -> None:
    """The product is exact in float32, so that the offset's sum is the only rounding."""
    form, w = GgmlFormat("q5_k"), _weight(1, 256)
    grid = form.fit(w)
    codes = form.encode(w, grid)
    scale, offset = form.values(grid)
    assert offset is not None
    exact = codes.double() * scale.double().repeat_interleave(32, 1) + offset.double().repeat_interleave(32, 1)
    assert np.array_equal(exact.float().numpy(), form.decode(codes, grid).numpy())
