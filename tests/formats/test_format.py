"""What every format has to do, whatever it stores."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.formats import ggml, known
from lilliput.target import Target

TARGETS: dict[str, dict[str, Any]] = {
    "int": {"bits": 3, "group_size": 32, "symmetric": False},
    "int nested": {"format": "int", "bits": 3, "group_size": 8, "symmetric": False, "scale_dtype": "int3/4"},
    "affine": {"bits": 3, "group_size": 32},
    "nf4": {"group_size": 32},
    "nf4 blocks": {"format": "nf4", "group_size": 16, "scale_dtype": "int8/64"},
    "dynamic8": {"group_size": 32},
    "e2m1": {"group_size": 32},
    "mxfp4": {},
    "nvfp4": {},
    "binary": {"bits": 2, "group_size": 32},
    "sign": {},
    "ternary": {"group_size": 32},
    "e8": {"group_size": "channel"},
    "vector": {"bits": 2, "group_size": "channel"},
    "trellis": {"bits": 3, "group_size": "channel"},
    "trellis-half": {"bits": 2, "group_size": "channel"},
    "codebook": {"bits": 3, "group_size": "channel"},
}


def moved(x: Any, device: str) -> Any:
    """Tensors of a grid, however it is made up, on another device."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, tuple):
        return tuple(moved(y, device) for y in x)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        fields = (f.name for f in dataclasses.fields(x) if f.init)
        return dataclasses.replace(x, **{name: moved(getattr(x, name), device) for name in fields})
    return x


def test_all_names_have_a_case() -> None:
    missing = (
        set(known.names())
        - {name.split()[0] for name in TARGETS}
        - {target.get("format") for target in TARGETS.values()}
        - set(ggml.KINDS)  # whose rows are blocks of 256: test_ggml.py
    )
    assert all(known.completed(Target(format=name)).bits is not None for name in missing)  # presets of level formats


@pytest.mark.parametrize("name", TARGETS)
def test_codes_are_packed_and_read_where_they_lie(name: str) -> None:
    """The device "meta" refuses what lies elsewhere, as an accelerator does, but needs none."""
    target = known.completed(Target(**{"format": name.split()[0], **TARGETS[name]}))
    form = known.from_target(target)
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
    grid = form.fit(weight)
    codes = form.encode(weight, grid)
    packed = form.pack(codes.to("meta"), moved(grid, "meta"))
    assert {x.device.type for x in packed.values()} == {"meta"}
    here = form.pack(codes, grid)
    assert {key: (x.shape, x.dtype) for key, x in packed.items()} == {
        key: (x.shape, x.dtype) for key, x in here.items()
    }
    assert form.decode(codes.to("meta"), moved(grid, "meta")).device.type == "meta"
