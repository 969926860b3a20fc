"""Estimates grow with what they count, and the layout is the fastest that fits."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lilliput import units
from lilliput.errors import PlanError
from lilliput.machine import memory
from lilliput.model import weights
from lilliput.model.stored import open_model
from lilliput.plan import footprint
from lilliput.plan.tensors import TensorPlan, at_a_time

Tiny = Callable[[str], Path]
GRAM = frozenset({"gram"})
SHAPE = footprint.Shape(hidden=256, vocabulary=512, samples=64, tokens=256, itemsize=4, stored=4, outside=10**6)


def test_the_estimate_grows(tiny: Tiny) -> None:
    blocks = open_model(str(tiny("wide"))).anatomy().blocks

    def size(
        shape: footprint.Shape = SHAPE, batch: int = 1, lockstep: bool = True, needs: frozenset[str] = GRAM
    ) -> int:
        return footprint.estimate(blocks, shape, batch=batch, lockstep=lockstep, needs=needs, rewriting=False)[0]

    # A small batch hides behind the solver, which works while no forward pass runs; a large one does not.
    assert size(batch=64) > size(batch=32) > size()
    assert size(lockstep=False) < size()
    assert size(replace(SHAPE, samples=128)) > size()
    assert size(replace(SHAPE, samples=128), lockstep=False) == size(lockstep=False)
    assert size(needs=frozenset()) < size(lockstep=False)
    assert size(replace(SHAPE, resident=10**6)) > size()
    # Depth costs nothing: one block is there at a time.
    twice = (*blocks, *blocks)
    assert footprint.estimate(twice, SHAPE, batch=1, lockstep=True, needs=GRAM, rewriting=False)[0] == size()


def test_the_phase_that_sets_the_peak_is_named(tiny: Tiny) -> None:
    blocks = open_model(str(tiny("wide"))).anatomy().blocks
    shape = replace(SHAPE, phases=(("dreaming", 10**12),))
    size, where = footprint.estimate(blocks, shape, batch=1, lockstep=True, needs=GRAM, rewriting=False)
    assert size > 10**12
    assert where == "dreaming"


def test_the_fastest_layout_that_fits(tiny: Tiny) -> None:
    blocks = open_model(str(tiny("wide"))).anatomy().blocks

    def choose(budget: int | None) -> footprint.Layout:
        return footprint.choose(blocks, SHAPE, budget=budget, needs=GRAM, rewriting=False)

    best = choose(10**12)
    assert best.lockstep
    assert best.batch == 4
    seen = [best]
    refused: PlanError | None = None
    while refused is None:
        try:
            seen.append(choose(seen[-1].bytes - 1))
        except PlanError as error:
            refused = error
        else:
            assert seen[-1].bytes < seen[-2].bytes
    assert not seen[-1].lockstep
    named = re.search(r"give --memory ([\d.]+)MB", str(refused))
    assert named is not None
    assert choose(int(float(named[1]) * 1e6)) == seen[-1]


@pytest.mark.parametrize(
    ("size", "up", "text"),
    [(999, False, "999B"), (1500, False, "1.50kB"), (10**9, False, "1.00GB"), (1_234_567, True, "1.24MB")],
)
def test_readable(size: int, up: bool, text: str) -> None:
    assert units.readable(size, up=up) == text


def test_the_peak_follows_what_is_touched() -> None:
    before = memory.peak_rss()
    ballast = bytearray(64 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    assert memory.resident() > 64 << 20
    assert memory.peak_rss() >= before
    assert memory.peak_rss() >= memory.resident() - (8 << 20)
    assert 0 <= memory.peak_above_base() <= memory.peak_rss()


def test_glibc_s_settings_end_with_the_outermost_context(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(memory, "_mallopt", lambda parameter, value: seen.append((parameter, value)))

    def set_since() -> dict[int, int]:
        found = dict(seen)
        seen.clear()
        return found

    with memory.steady():
        assert set_since() == {-3: 3 * memory.MB, -1: 24 * memory.MB}
        with memory.steady(memory.FORWARD):
            assert set_since()[-3] == memory.FORWARD
        assert set_since()[-3] == 3 * memory.MB
        with pytest.raises(ValueError, match="inside"), memory.steady(memory.FORWARD):
            raise ValueError("inside")
        assert set_since()[-3] == 3 * memory.MB
    # Where glibc's threshold ends by itself once a process has freed large tensors; arenas are left alone.
    assert set_since() == {-3: memory.GROWN, -1: 2 * memory.GROWN}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_library_call_leaves_the_host_s_allocator_usable(tmp_path: Path) -> None:
    """Tensors of 8 MB are mapped anew each time inside the context, and behind it are kept on the heap again."""
    script = """
import resource, torch
from lilliput.machine import memory

def faults() -> int:
    for _ in range(10):
        torch.ones(2 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with memory.steady():
    inside = faults()
print(inside, faults())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    inside, behind = (int(x) for x in done.stdout.split())
    assert inside > 20 * 100
    assert behind < inside / 10


def test_the_vocabulary_s_table_counts_by_pieces() -> None:
    table = TensorPlan("x", "embedding", torch.float16, (262_144, 640), 0, None, "x")
    assert at_a_time(table) == weights.TABLE_ROWS * 640 * 10
    small = TensorPlan("x", "norm", torch.float32, (640,), 0, None, "x")
    assert at_a_time(small) == 640 * 12
    assert at_a_time(replace(small, shape=())) == 12
    convolution = TensorPlan("x", "carried", torch.float32, (8, 1 << 20, 4), 0, None, "x")
    assert at_a_time(convolution) == 12 * (4 << 20)
