"""Streams: each block of each model runs as often as it has something to say."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from lilliput.anatomy.skeleton import Skeleton
from lilliput.attribution.restore import restore
from lilliput.model.stored import open_model


def test_the_original_passes_its_blocks_once(llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(llama())
    ours, base = open_model(folder), open_model(folder)
    blocks = len(base.skeleton.block_names)
    runs: Counter[str] = Counter()
    inner = Skeleton.run

    def counted(self: Skeleton, *args: object) -> torch.Tensor:
        runs["original" if self is base.skeleton else "compressed"] += 1
        return inner(self, *args)

    base.anatomy()
    monkeypatch.setattr(Skeleton, "run", counted)
    ids = torch.arange(48).view(2, 24)
    found = restore(ours, base, ids, tmp_path, blocks=[1, 3], outputs=True)
    # The original's own stream, and the two blocks that it lends to the compressed one.
    assert runs["original"] == blocks + 2
    assert found.total == 0.0
    assert [x.error for x in found.drift] == [0.0] * blocks
    assert len(found.block_outputs) == blocks
    assert found.blocks == {1: 0.0, 3: 0.0}
    assert not list(tmp_path.glob("*.bin"))


def test_outputs_change_no_divergence(llama, tmp_path: Path) -> None:
    """Whether outputs are measured on the way or not, the original's stream is the same."""
    base = llama()
    ours, original = open_model(str(base)), open_model(str(base))
    inner = ours.read
    ours.read = lambda name: inner(name) * 1.05 if name.endswith("up_proj.weight") else inner(name)  # type: ignore[method-assign]
    ids = torch.arange(60).view(3, 20)
    plain = restore(ours, original, ids, tmp_path, blocks=[2])
    seen = restore(ours, original, ids, tmp_path, blocks=[2], outputs=True)
    assert plain.total > 0
    assert (plain.total, plain.blocks) == (seen.total, seen.blocks)
    assert all(0 < x.error < 0.2 for x in seen.block_outputs)
