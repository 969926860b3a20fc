"""Estimates grow with what they count, and the layout is the fastest that fits."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lilliput import memory
from lilliput.errors import PlanError
from lilliput.model import open_model

Tiny = Callable[[str], Path]
GRAM = frozenset({"gram"})
SHAPE = memory.Shape(hidden=256, vocabulary=512, samples=64, tokens=256, itemsize=4, stored=4, outside=10**6)


def test_the_estimate_grows(tiny: Tiny) -> None:
    blocks = open_model(str(tiny("wide"))).anatomy().blocks

    def size(shape: memory.Shape = SHAPE, batch: int = 1, lockstep: bool = True, needs: frozenset[str] = GRAM) -> int:
        return memory.estimate(blocks, shape, batch=batch, lockstep=lockstep, needs=needs, rewriting=False)[0]

    # A small batch hides behind the solver, which works while no forward pass runs; a large one does not.
    assert size(batch=64) > size(batch=32) > size()
    assert size(lockstep=False) < size()
    assert size(replace(SHAPE, samples=128)) > size()
    assert size(replace(SHAPE, samples=128), lockstep=False) == size(lockstep=False)
    assert size(needs=frozenset()) < size(lockstep=False)
    assert size(replace(SHAPE, resident=10**6)) > size()
    # Depth costs nothing: one block is there at a time.
    twice = (*blocks, *blocks)
    assert memory.estimate(twice, SHAPE, batch=1, lockstep=True, needs=GRAM, rewriting=False)[0] == size()


def test_the_phase_that_sets_the_peak_is_named(tiny: Tiny) -> None:
    blocks = open_model(str(tiny("wide"))).anatomy().blocks
    shape = replace(SHAPE, phases=(("dreaming", 10**12),))
    size, where = memory.estimate(blocks, shape, batch=1, lockstep=True, needs=GRAM, rewriting=False)
    assert size > 10**12
    assert where == "dreaming"


def test_the_fastest_layout_that_fits(tiny: Tiny) -> None:
    blocks = open_model(str(tiny("wide"))).anatomy().blocks

    def choose(budget: int | None) -> memory.Layout:
        return memory.choose(blocks, SHAPE, budget=budget, needs=GRAM, rewriting=False)

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
    assert memory.readable(size, up=up) == text


def test_the_peak_follows_what_is_touched() -> None:
    before = memory.peak_rss()
    ballast = bytearray(64 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    assert memory.resident() > 64 << 20
    assert memory.peak_rss() >= before
    assert memory.peak_rss() >= memory.resident() - (8 << 20)
    assert 0 <= memory.peak_above_base() <= memory.peak_rss()
