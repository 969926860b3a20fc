"""Estimates grow with what they count, and the batching is the fastest that fits."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lilliput import units
from lilliput.errors import PlanError
from lilliput.machine import memory
from lilliput.machine.cost import Cost, Phase
from lilliput.model import weights
from lilliput.model.stored import Model, open_model
from lilliput.plan import footprint
from lilliput.plan.resolve import Resolved, resolve
from lilliput.plan.tensors import TensorPlan, at_a_time
from lilliput.recipe.schema import Recipe
from lilliput.streaming.peak import Run

Tiny = Callable[[str], Path]
STEPS = {"gptq": {"bits": 4}, "spqr": {"bits": 4, "group_size": 16}}


def resolved(model: Model, *steps: dict[str, Any]) -> tuple[Resolved, Run]:
    """The steps on the model, and a run on 64 samples of 256 tokens in float32."""
    recipe = Recipe.model_validate({"steps": list(steps) or [{"method": "gptq"}]})
    width = model.skeleton.hidden_size
    done = resolve(recipe, model.anatomy(), torch.float16, dtype_of=model.written_dtype, width=width)
    return done, Run(model.anatomy().blocks, width, 512, samples=64, tokens=256, itemsize=4, stored=4)


def size(done: Resolved, run: Run, lockstep: bool = True, packed: int = 0) -> int:
    return footprint.estimate(done, run, (), lockstep=lockstep, packed=packed)[0]


def test_the_estimate_grows(tiny: Tiny) -> None:
    model = open_model(str(tiny("wide")))
    done, run = resolved(model)
    # A small batch hides behind the solver, which works while no forward pass runs; a large one does not.
    assert size(done, replace(run, batch=64)) > size(done, replace(run, batch=32)) > size(done, run)
    assert size(done, run, lockstep=False) < size(done, run)
    assert size(done, replace(run, samples=128)) > size(done, run)
    assert size(done, replace(run, samples=128), lockstep=False) == size(done, run, lockstep=False)
    assert size(done, run, packed=10**6) > size(done, run)
    plain, _ = resolved(model, {"method": "magnitude"})
    assert size(plain, run) < size(done, run, lockstep=False)
    turned, _ = resolved(model, {"method": "hadamard"}, {"method": "gptq"})
    assert size(turned, run) > size(done, run)


def test_depth_costs_nothing(tiny: Tiny) -> None:
    model = open_model(str(tiny("wide")))
    done, run = resolved(model)
    fewer = replace(done, linears=tuple(x for x in done.linears if x.block < 2))
    assert size(fewer, replace(run, blocks=run.blocks[:2])) == size(done, run)


def test_what_a_step_holds_counts(tiny: Tiny) -> None:
    model = open_model(str(tiny("wide")))
    sizes = [size(*resolved(model, {"method": name, "target": target})) for name, target in STEPS.items()]
    assert sizes[0] < sizes[1]  # working memory
    plain = size(*resolved(model, {"method": "magnitude"}))
    assert size(*resolved(model, {"method": "svd-truncate", "target": {"ratio": 0.5}})) > plain  # in float64
    turned = size(*resolved(model, {"method": "quip"}))
    assert turned > sizes[0]  # what is turned lies beside what it was made from
    grid = {"format": "codebook", "bits": 3, "group_size": "channel"}
    assert size(*resolved(model, {"method": "squeezellm", "target": grid})) > 1.5 * plain  # squared gradients


def test_the_phase_that_sets_the_peak_is_named(tiny: Tiny) -> None:
    done, run = resolved(open_model(str(tiny("wide"))))
    phases = (Phase("dreaming", Cost(ram=10**12)),)
    most, where = footprint.estimate(done, run, phases, lockstep=True, packed=0)
    assert most > 10**12
    assert where == "dreaming"


def test_the_fastest_batching_that_fits(tiny: Tiny) -> None:
    done, run = resolved(open_model(str(tiny("wide"))))

    def choose(budget: int | None) -> footprint.Batching:
        return footprint.choose(done, run, (), packed=0, budget=budget)

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
    """Tensors of 8 MB are mapped anew each time inside the context, and after it are kept on the heap again."""
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
    inside, after = (int(x) for x in done.stdout.split())
    assert inside > 20 * 100
    assert after < inside / 10


def test_the_vocabulary_s_table_counts_by_pieces() -> None:
    table = TensorPlan("x", "embedding", torch.float16, (262_144, 640), 0, None, "x")
    assert at_a_time(table) == weights.TABLE_ROWS * 640 * 10
    small = TensorPlan("x", "norm", torch.float32, (640,), 0, None, "x")
    assert at_a_time(small) == 640 * 12
    assert at_a_time(replace(small, shape=())) == 12
    convolution = TensorPlan("x", "carried", torch.float32, (8, 1 << 20, 4), 0, None, "x")
    assert at_a_time(convolution) == 12 * (4 << 20)
