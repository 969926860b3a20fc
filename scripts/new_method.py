#!/usr/bin/env python3
"""Write a new method and its reference test: a small method that works and passes, to be replaced piece by piece.

    python scripts/new_method.py FAMILY NAME [--root CHECKOUT]

FAMILY is weight (one linear at a time) or rewrite (a block that keeps its function). NAME is what recipes call it.
Every place to change is marked with "replace:".
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

WEIGHT = '''"""replace: one line that says what NAME does. Now: round to nearest on a narrowed range.

replace: the equations. Unit u of weights that share a scale S (and zero point Z), narrowing c: S <- c S;
q = clip(round(w / S) + Z); what is computed with is S (q - Z).

Paper: replace: authors, year, arXiv number. Cost: O(out * in). Limits: errors of a row's weights are not balanced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field

from lilliput.formats.integer import from_target
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.stats.site import SiteStats
from lilliput.target import Strict, Target

PAPER = "replace: authors, year, arXiv number"
NEEDS: tuple[str, ...] = ()  # replace: the statistics you read, of lilliput.stats.fold.NAMES
WRITES: Literal["quantized"] = "quantized"  # replace: "support" where you only choose zeros
ROWWISE = True  # replace: False where output rows depend on each other
BASELINE: str | None = None  # replace: the method that yours must beat on correlated inputs
# replace: each catalogue id that this file implements, with the steps that run it, or None for an idea
COVERS: Mapping[str, list[dict[str, Any]] | None] = {}


class Options(Strict):
    """replace: your options, each with a default and a description."""

    narrow: float = Field(1.0, gt=0.0, le=1.0, description="factor on the range that min-max found")


def compress(layer: Layer, stats: SiteStats, target: Target, o: Options) -> Layer:
    """Codes for what the layer's parts leave over, on its support. Raises PlanError without bits in the target."""
    weight = layer.rest()
    if layer.support is not None:
        weight = torch.where(layer.support, weight, 0.0)
    # replace: from here on
    grid_format = from_target(target)
    grid = grid_format.fit(weight)
    grid = replace(grid, scale=(grid.scale.float() * o.narrow).to(grid.scale.dtype))
    return layer.with_part(QuantizedPart(grid_format, grid_format.encode(weight, grid), grid))
'''

WEIGHT_TEST = '''"""NAME against a slow version written from its equations, in float64."""

from __future__ import annotations

import pytest
import torch

from lilliput.methods.weight.MODULE import Options, compress
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.stats.site import SiteStats
from lilliput.target import Target


def reference(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """replace: your equations, as obvious as can be. Now: of all values on the grid, the nearest, one by one."""
    out = torch.empty(weight.shape, dtype=torch.float64)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            s, z = float(scale[row, column // group]), int(zero[row, column // group])
            values = [s * (code - z) for code in range(-(2 ** (bits - 1)), 2 ** (bits - 1))]
            out[row, column] = min(values, key=lambda v: abs(v - float(weight[row, column])))
    return out


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_MODULE_agrees_with_the_reference(bits: int, symmetric: bool) -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    target = Target(bits=bits, group_size=16, symmetric=symmetric, scale_dtype="float16")
    layer = compress(Layer("x", weight), SiteStats(32, 0), target, Options(narrow=0.9))
    part = layer.parts[0]
    assert isinstance(part, QuantizedPart)
    scale = part.grid.scale.double()
    zero = torch.zeros_like(scale) if part.grid.zero is None else part.grid.zero
    expected = reference(weight, scale, zero, bits, 16)
    # Where two values are equally near, either is right: compare errors, not values.
    error, least = (layer.decode() - weight).double().abs(), (expected - weight).abs()
    torch.testing.assert_close(error, least, rtol=0, atol=1e-6)


def test_MODULE_narrows_the_range() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    target = Target(bits=4, group_size=32, scale_dtype="float16")
    scales = []
    for narrow in (1.0, 0.5):
        part = compress(Layer("x", weight), SiteStats(32, 0), target, Options(narrow=narrow)).parts[0]
        assert isinstance(part, QuantizedPart)
        scales.append(part.grid.scale.float())
    torch.testing.assert_close(scales[1], 0.5 * scales[0], rtol=1e-3, atol=0)


def test_MODULE_writes_on_the_support_only() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(32).expand(4, 32) % 2 == 0
    target = Target(bits=4, group_size=32, symmetric=False, scale_dtype="float16")
    layer = compress(Layer("x", weight).with_support(mask), SiteStats(32, 0), target, Options())
    assert not bool(layer.decode()[~mask].any())
'''

REWRITE = '''"""replace: one line that says what NAME does. Now: even out the ranges of input channels.

replace: the equations. Channel j of a site, with largest input a_j: s_j = a_j^p, then divided by the geometric mean of
all s; the columns that read the channel are multiplied by s_j, what feeds it is divided.

Paper: replace: authors, year, arXiv number. Cost: O(width) for a link. Limits: looks at inputs only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from lilliput.folds.kinds import Fold, ScaleFold
from lilliput.target import Strict, Target
from lilliput.verbs.view import BlockIO, BlockView

PAPER = "replace: authors, year, arXiv number"
NEEDS: tuple[str, ...] = ("absmax",)  # replace: the statistics you read, of lilliput.stats.fold.NAMES
WRITES: Literal["fold"] = "fold"
BASELINE: str | None = None  # replace: the method that yours must beat on correlated inputs
# replace: each catalogue id that this file implements, with the steps that run it, or None for an idea
COVERS: Mapping[str, list[dict[str, Any]] | None] = {}


class Options(Strict):
    """replace: your options, each with a default and a description."""

    strength: float = Field(0.5, ge=0.0, le=1.0, description="0 leaves ranges as they are, 1 makes them equal")


def rewrite(block: BlockView, io: BlockIO, target: Target, o: Options) -> Sequence[Fold]:
    """A scale for every link of the block: readers' columns times s, the producer's rows divided by s."""
    folds: list[Fold] = []
    for link in block.anatomy.links:
        # replace: from here on
        largest = link.tie(io.stats[link.site].need("absmax")).clamp_min(1e-5)
        scale = largest.pow(o.strength)
        folds.append(ScaleFold(link, scale / scale.log().mean().exp()))
    return folds
'''

REWRITE_TEST = '''"""NAME against a slow version written from its equations, in float64."""

from __future__ import annotations

import math

import torch

from lilliput.anatomy.model import Block, Linear, Link, Site
from lilliput.folds.kinds import ScaleFold
from lilliput.methods.rewrite.MODULE import Options, rewrite
from lilliput.stats.fold import init, update
from lilliput.target import Target
from lilliput.verbs.view import BlockIO, BlockView


def reference(inputs: torch.Tensor, strength: float) -> list[float]:
    """replace: your equations, as obvious as can be."""
    powers = [max(abs(float(x)) for x in inputs[:, j]) ** strength for j in range(inputs.shape[1])]
    mean = math.exp(sum(math.log(p) for p in powers) / len(powers))
    return [p / mean for p in powers]


def test_MODULE_agrees_with_the_reference_and_keeps_the_function() -> None:
    width, strength = 8, 0.7
    draw = torch.Generator().manual_seed(0)
    gain = torch.rand(width, generator=draw) + 0.5
    x = torch.randn(20, width, generator=draw)
    weight = torch.randn(4, width, generator=draw)
    link = Link("norm", "norm", ("up",), "up", torch.arange(width))
    block = Block((Linear("up", "up", "up", 4, width),), (Site("up", width, ("up",), 0),), (link,), ())
    stats = update(init(width, ("absmax",)), x * gain)
    folds = rewrite(BlockView(block, {"up": weight}), BlockIO({"up": stats}), Target(), Options(strength=strength))
    assert len(folds) == 1
    fold = folds[0]
    assert isinstance(fold, ScaleFold)
    expected = torch.tensor(reference((x * gain).double(), strength))
    torch.testing.assert_close(fold.scale, expected, rtol=1e-5, atol=0)
    after = (x * (gain / fold.scale)) @ (weight * fold.scale).T
    torch.testing.assert_close(after, (x * gain) @ weight.T, rtol=1e-4, atol=1e-5)
'''

TEMPLATES = {"weight": (WEIGHT, WEIGHT_TEST), "rewrite": (REWRITE, REWRITE_TEST)}


def write(root: Path, family: str, name: str) -> tuple[Path, Path]:
    """The method's file and its test's, below `root`. Raises SystemExit with the reason where they cannot be."""
    if family not in TEMPLATES:
        sys.exit(f"error: no family '{family}': choose one of {', '.join(TEMPLATES)}")
    if re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) is None:
        sys.exit(f"error: '{name}' is no name for a method: small letters, digits and single dashes, such as my-method")
    module = name.replace("-", "_")
    methods = root / "src" / "lilliput" / "methods"
    taken = list(methods.glob(f"*/{module}.py"))
    if not methods.is_dir():
        sys.exit(f"error: {root} is no checkout of lilliput: {methods} does not exist")
    if taken:
        sys.exit(f"error: there is a method '{name}' already: {taken[0]}")
    files = (methods / family / f"{module}.py", root / "tests" / "methods" / family / f"test_{module}.py")
    for path, template in zip(files, TEMPLATES[family], strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(template.replace("MODULE", module).replace("NAME", name), encoding="utf-8")
    return files


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", help="weight or rewrite")
    parser.add_argument("name", help="what recipes call it, such as my-method")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="the checkout")
    given = parser.parse_args(arguments)
    method, test = write(given.root, given.family, given.name)
    print(f"wrote {method}\nwrote {test}\nrun: pytest {test}")


if __name__ == "__main__":
    main()
