"""Runs that die at a chosen call, in a process of their own, and what a run that nobody disturbs writes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lilliput import api

SAME: dict[str, Any] = {"samples": 4, "tokens": 32, "device": "cpu", "dtype": "float32", "eval_windows": 0}
MANY = {"samples": 16, "tokens": 128}  # enough that suspended forward passes weigh more than an evaluation
# Searches are shortened: what they find does not matter here.
QUICK = {
    "gptq": ("gptq.search=minmax",),
    "awq-gptq": ("gptq.search=minmax", "awq.grid=3", "awq.search=minmax"),
    "magnitude": (),
}
Tiny = Callable[[str], Path]


class Driver:
    """The process of kill_driver.py."""

    def __init__(self, folder: Path, model: Path) -> None:
        script = Path(__file__).with_name("kill_driver.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(folder), str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, **job: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job, default=str) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)


@pytest.fixture(scope="session")
def driver(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    made = Driver(tmp_path_factory.mktemp("stderr"), tiny("llama"))
    yield made
    made.close()


def squeezed(model: Path, recipe: str) -> int:
    """A memory budget under which the sites of a block are reached by running it again, not all at once."""
    room = {key: (SAME | MANY)[key] for key in ("samples", "tokens", "device", "dtype")}
    plan = api.plan(model, recipe=recipe, **room)
    while plan.batching.lockstep:
        plan = api.plan(model, recipe=recipe, memory=plan.batching.bytes - 1, **room)
    assert plan.budget is not None
    return plan.budget


@dataclass(frozen=True)
class Unbroken:
    """What a run that nobody disturbs is called with, and what it writes."""

    args: dict[str, Any]
    weights: dict[str, str]

    @staticmethod
    def weights_of(folder: Path) -> dict[str, str]:
        return {x.name: hashlib.sha256(x.read_bytes()).hexdigest() for x in sorted(folder.glob("*.safetensors"))}

    def line(self, out: Path, *more: str) -> list[str]:
        """The same as a command line."""
        fixed = ["--samples", "4", "--tokens", "32", "--device", "cpu", "--dtype", "float32", "--json"]
        fixed += [x for setting in self.args["settings"] for x in ("--set", setting)]
        return ["compress", str(self.args["model"]), "--out", str(out), "--recipe", self.args["recipe"], *fixed, *more]


@pytest.fixture(scope="session")
def unbroken(tiny: Tiny, driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Unbroken]:
    found: dict[tuple[str, bool, int | None], Unbroken] = {}

    def make(recipe: str, tight: bool, shard: int | None = None) -> Unbroken:
        key = recipe, tight, shard
        if key not in found:
            out = tmp_path_factory.mktemp("unbroken") / "out"
            args = {"model": tiny("llama"), "recipe": recipe, **SAME, "settings": QUICK[recipe]}
            if tight:
                args |= {**MANY, "memory": squeezed(tiny("llama"), recipe)}
            done = driver(args={**args, "out": out}, **({} if shard is None else {"shard": shard}))
            assert done["code"] == 0, done["stderr"]
            assert done["lockstep"] is not tight or recipe == "magnitude"
            found[key] = Unbroken(args, Unbroken.weights_of(out))
        return found[key]

    return make
