"""Which driver runs which verb, and that a new verb is a spec, a driver and its methods: no other file changes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lilliput import methods
from lilliput.run import drivers
from lilliput.run.driver import ModelDriver
from lilliput.target import Target
from lilliput.verbs.objective import Objective
from lilliput.verbs.spec import Task

SRC = Path(__file__).resolve().parents[2] / "src"

VERB = '''
"""The verb `clip`: a weight without its largest values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lilliput.errors import PlanError
from lilliput.verbs.spec import OptionsT, Spec, Stage, Task, Writes


@dataclass(frozen=True, kw_only=True)
class Clip(Spec[OptionsT]):
    """`run(weight, options)`: the clipped weight."""

    verb: ClassVar[str] = "clip"
    family: ClassVar[str] = "clip"
    stage: ClassVar[Stage] = Stage.LINEAR
    settles: ClassVar[bool] = True

    run: Callable[[Tensor, OptionsT], Tensor]
    writes: Writes = "parts"

    def plain(self, options: OptionsT) -> bool:
        return True

    def ordered(self, task: Task, recipe: Sequence[Task]) -> None:
        if task.step:
            raise PlanError(f"{task.label} clips the model's own weights: move it to the front")
'''
DRIVER = '''
"""How `clip` is carried out."""

from __future__ import annotations

from lilliput.parts.dense import DensePart
from lilliput.parts.layer import Layer
from lilliput.run.driver import LinearDriver
from lilliput.stats.site import SiteStats
from lilliput.verbs.clip import Clip
from lilliput.verbs.spec import Task


def run(task: Task, layer: Layer, stats: SiteStats) -> Layer:
    return layer.with_part(DensePart(task.of(Clip).run(layer.rest(), task.options)))


DRIVER = LinearDriver(verb=Clip, run=run)
'''
METHOD = '''
"""Nothing larger than so many root mean squares."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from lilliput.target import Strict
from lilliput.verbs.clip import Clip


class Options(Strict):
    most: float = Field(1.0, gt=0.0, description="root mean squares")


def clip(weight: Tensor, o: Options) -> Tensor:
    top = o.most * float(weight.square().mean().sqrt())
    return weight.clamp(-top, top)


METHOD = Clip(paper="none", options=Options, needs=(), covers={}, run=clip)
'''
FILES = {"verbs/clip.py": VERB, "run/drivers/clip.py": DRIVER, "methods/clip/at_rms.py": METHOD}
RUN = """
import sys
from lilliput import api, methods
from lilliput.errors import PlanError
from lilliput.progress import Quiet
from lilliput.recipe.schema import Recipe, Step
from lilliput.verbs.clip import Clip

assert methods.verbs()["clip"] is Clip
model, out = sys.argv[1:]
api.compress(model, out, recipe="at-rms", samples=2, tokens=16, device="cpu", dtype="float32", eval_windows=0,
             settings=["at-rms.most=0.5"], progress=Quiet())
try:
    api.plan(model, recipe=Recipe(steps=(Step(method="rtn"), Step(method="at-rms"))), samples=2, tokens=16)
except PlanError as error:
    assert "step 2 (at-rms) clips the model's own weights" in str(error), error
else:
    raise AssertionError("its rule of order was not asked")
"""


def _task(name: str) -> Task:
    method = methods.get(name)
    return Task(0, method, Target(), method.parse({}))


def test_every_verb_with_methods_has_a_driver() -> None:
    # An objective is no step: training steps name it.
    steps = {spec for spec in methods.verbs().values() if spec is not None} - {Objective}
    assert steps == set(drivers.discover())


def test_a_driver_of_another_stage_is_no_answer() -> None:
    with pytest.raises(RuntimeError, match=r"step 1 \(rtn\) is carried out on a linear"):
        drivers.of(_task("rtn"), ModelDriver)


@pytest.mark.slow
def test_a_new_verb_is_a_spec_a_driver_and_its_method(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    package = tmp_path / "src" / "lilliput"
    shutil.copytree(SRC / "lilliput", package, ignore=shutil.ignore_patterns("__pycache__"))
    before = {path: path.read_bytes() for path in package.rglob("*") if path.is_file()}
    for name, text in FILES.items():
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text(text.lstrip(), encoding="utf-8")
    model, out = tiny("qwen2"), tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-B", "-c", RUN, str(model), str(out)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    after = {path: path.read_bytes() for path in package.rglob("*") if path.is_file()}
    assert len(after.keys() - before.keys()) == 3
    assert {path: after[path] for path in before} == before
    name = "model.layers.1.mlp.up_proj.weight"
    weight, written = (load_file(folder / "model.safetensors")[name].float() for folder in (model, out))
    top = 0.5 * float(weight.square().mean().sqrt())
    assert 0.0 < top < float(weight.abs().max())
    assert bool((written == weight.clamp(-top, top)).all())
