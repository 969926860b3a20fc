"""Kept weights by tiles, against loops over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lilliput import api
from lilliput.errors import PlanError
from lilliput.model.stored import open_model
from lilliput.parts import kept, known, tiles
from lilliput.parts.bitmask import BitmaskSpec
from lilliput.parts.dense import DenseSpec
from lilliput.parts.layer import Layer
from lilliput.parts.tiles import TilesSpec
from lilliput.progress import Quiet


def _matrix(rows: int, width: int, share: float) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(rows * width)
    return torch.randn(rows, width, generator=g), torch.rand(rows, width, generator=g) < share


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (128, 64), (130, 65), (257, 200), (5, 300)])
@pytest.mark.parametrize("share", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_place_and_value_is_where_the_format_says(
    rows: int, width: int, share: float, dtype: torch.dtype
) -> None:
    weight, mask = _matrix(rows, width, share)
    part = tiles.gather(weight, mask, dtype)
    packed = part.pack()
    values, places, begins = [], [], [0]
    for top in range(0, rows, 128):
        for left in range(0, width, 64):
            for i in range(top, min(top + 128, rows)):
                for j in range(left, min(left + 64, width)):
                    if mask[i, j]:
                        values.append(float(weight[i, j].to(dtype)))
                        places.append(64 * (i - top) + j - left)
            begins.append(len(values))
    assert packed[""].tolist() == values
    assert packed["_place"].to(torch.int64).tolist() == places
    assert packed["_tile"].tolist() == begins
    stored = {name: (x.dtype, tuple(x.shape)) for name, x in packed.items()}
    assert stored == part.spec.stored(rows, width)
    assert part.bits() == part.spec.size_bits(rows, width)
    assert part.bits() == sum(8 * x.numel() * x.element_size() for x in packed.values())
    exact = (weight * mask).to(dtype).float()
    assert torch.equal(part.decode(), exact)
    out = torch.ones(rows, width, dtype=torch.float64)
    part.spec.add_to(out, packed.__getitem__)
    assert torch.equal(out, 1 + exact.double())
    assert known.from_plain(part.spec.plain()) == part.spec


def test_rows_are_a_part_of_their_own() -> None:
    weight, mask = _matrix(300, 70, 0.1)
    part = tiles.gather(weight, mask, torch.float32).rows(100, 250)
    assert torch.equal(part.decode(), (weight * mask)[100:250])
    out = torch.zeros(150, 70)
    part.spec.add_to(out, part.pack().__getitem__)
    assert torch.equal(out, part.decode())


@pytest.mark.parametrize(
    ("share", "places", "kind"),
    [(0.05, "tiles", TilesSpec), (0.05, "bits", BitmaskSpec), (0.07, "tiles", BitmaskSpec), (1.0, "tiles", DenseSpec)],
)
def test_tiles_are_taken_where_they_are_asked_for_and_smaller(share: float, places: str, kind: type) -> None:
    rows, width = 256, 512
    count = round(share * rows * width)
    spec = kept.spec_of(rows, width, torch.float16, None, count, places)
    assert isinstance(spec, kind)
    mask = torch.zeros(rows * width, dtype=torch.bool)
    mask[torch.randperm(rows * width, generator=torch.Generator().manual_seed(0))[:count]] = True
    layer = Layer("x", _matrix(rows, width, 1.0)[0], support=mask.view(rows, width))
    assert torch.equal(kept.part_of(layer, spec).decode(), layer.decode().half().float())


def test_folders_by_tiles_have_the_planned_bytes_and_open(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    run: dict[str, Any] = {"samples": 2, "tokens": 32, "device": "cpu", "dtype": "float32", "progress": Quiet()}
    sizes = {}
    for places in ("tiles", "bits"):
        recipe = f"export: lilliput\nsteps:\n  - {{method: magnitude, target: {{sparsity: 0.97, places: {places}}}}}\n"
        done = api.compress(tiny("llama"), tmp_path / places, recipe=recipe, eval_windows=0, **run)
        sizes[places] = sum(x.stat().st_size for x in (tmp_path / places).glob("*.safetensors"))
        assert done.plan.bytes == sizes[places]
    config = (tmp_path / "tiles" / "config.json").read_text(encoding="utf-8")
    assert '"tiles"' in config
    assert sizes["tiles"] < sizes["bits"]
    one, two = open_model(tmp_path / "tiles"), open_model(tmp_path / "bits")
    assert all(torch.equal(one.read(x), two.read(x)) for x in one.skeleton.shapes)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(tmp_path / x).eval()(ids).logits for x in ("tiles", "bits")]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    assert api.verify(tmp_path / "tiles").problems == ()
    recipe = "export: compressed-tensors\nsteps:\n  - {method: magnitude, target: {sparsity: 0.97, places: tiles}}\n"
    with pytest.raises(PlanError, match="go into tiles, which engines do not read"):
        api.plan(tiny("llama"), recipe=recipe, samples=2, tokens=32, device="cpu", dtype="float32")
