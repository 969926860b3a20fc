"""Files written a few rows at a time are those that the library writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lilliput.export.pieces import save_pieces

TENSORS = {
    "z.table": torch.randn(10, 4).half(),
    "a.norm": torch.randn(4),
    "codes": torch.arange(12, dtype=torch.int32).view(3, 4),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "none": torch.empty(0, 4),
    "one": torch.tensor(3.0, dtype=torch.bfloat16),
    "flipped": torch.randn(4, 6).T,
}
LAYOUT = {name: (x.dtype, tuple(x.shape)) for name, x in TENSORS.items()}


def rows(name: str) -> Iterator[Tensor]:
    whole = TENSORS[name]
    yield from (whole,) if whole.dim() == 0 else whole.split(3)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_bytes_are_the_library_s(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({k: v.contiguous() for k, v in TENSORS.items()}, tmp_path / "theirs", metadata=metadata)
    hashes = save_pieces(tmp_path / "ours", LAYOUT, rows, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert set(hashes) == set(TENSORS)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["ours", "theirs"]


def test_what_does_not_fit_the_plan_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"z\.table was planned with 40 elements and comes with 12"):
        save_pieces(tmp_path / "short", {"z.table": LAYOUT["z.table"]}, lambda name: iter([TENSORS[name][:3]]))
    with pytest.raises(RuntimeError, match=r"planned as torch\.float16 and comes as torch\.float32"):
        save_pieces(tmp_path / "wide", {"z.table": LAYOUT["z.table"]}, lambda name: iter([TENSORS[name].float()]))
    assert not (tmp_path / "short").exists()
    assert not (tmp_path / "wide").exists()
