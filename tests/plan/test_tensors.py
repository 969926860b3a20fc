"""Which file a tensor goes to: files as large as the limit allows, one name where all fits, nothing lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lilliput import api
from lilliput.export.folder import safetensors_bytes
from lilliput.plan import tensors as inventory
from lilliput.plan.plan import Plan
from lilliput.plan.tensors import METADATA, SHARD, TensorPlan

Tiny = Callable[[str], Path]


def plan(model: Path) -> Plan:
    return api.plan(model, recipe="gptq", samples=4, tokens=32, device="cpu", dtype="float32")


def test_what_fits_into_one_file_is_one(tiny: Tiny) -> None:
    made = plan(tiny("llama"))
    assert made.shards == ("model.safetensors",)
    assert {x.shard for x in made.tensors} == {0}
    assert made.bytes == safetensors_bytes({x.name: (x.dtype, x.shape) for x in made.tensors}, METADATA)


@pytest.mark.parametrize("limit", [3_000, 8_000, 30_000, 200_000])
def test_files_hold_what_the_limit_allows(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    whole = plan(tiny("llama"))
    monkeypatch.setattr(inventory, "SHARD", limit)
    made = plan(tiny("llama"))
    count = len(made.shards)
    assert count > 1
    assert made.shards == tuple(f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1))
    assert [replace(x, shard=0) for x in made.tensors] == list(whole.tensors)
    for n in range(count):
        held = made.of_shard(n)
        assert held
        assert made.shard_bytes(n) <= limit or len(held) == 1
        if n + 1 < count and len(held) > 1:  # what comes next had no room, but for a rest as small as a header's entry
            more = {x.name: (x.dtype, x.shape) for x in (*held, made.of_shard(n + 1)[0])}
            assert safetensors_bytes(more, METADATA) > limit - 100 * len(held)
    blocks = [x.block for x in made.tensors]
    assert blocks == sorted(blocks, key=lambda block: -1 if block is None else block)
    assert {x.name for n in (None, 0, 1, 2, 3) for x in made.of_block(n)} == {x.name for x in made.tensors}


def test_the_limit_is_that_of_the_ecosystem() -> None:
    sizes = [2_400_000_000, 2_400_000_000, 300_000_000, 6_000_000_000, 1, 4_999_999_000, 2_500_000_000, 2_500_000_000]
    tensors = [TensorPlan(f"{n}", "linear", torch.uint8, (size,), 0, n, "x") for n, size in enumerate(sizes)]
    placed, names = inventory._shared_out(tensors)
    # Two of 2.5 GB fill the limit without a header, so they part.
    assert [x.shard for x in placed] == [0, 0, 1, 2, 3, 3, 4, 5]
    assert names[0] == "model-00001-of-00006.safetensors"
    for n in (0, 1, 3, 4, 5):
        assert safetensors_bytes({x.name: (x.dtype, x.shape) for x in placed if x.shard == n}, METADATA) <= SHARD
