"""Training that is killed, interrupted or out of disk, then the same call again: the same losses and the same bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lilliput import api

pytestmark = pytest.mark.slow

Driver = Callable[..., dict[str, Any]]
TRAINING = {"steps": 5, "batch": 2, "lr": 0.003, "save": 2}


def recipe(folder: Path, *trained: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    steps: list[dict[str, Any]] = [{"method": "rtn", "target": {"bits": 3, "group_size": 32}}]
    steps += [{"method": "lsq", "options": {**TRAINING, **x}} for x in trained]
    path.write_text(json.dumps({"steps": steps}))
    return path


@pytest.fixture
def args(tiny: Callable[[str], Path], tmp_path: Path) -> dict[str, Any]:
    """One training step, and another with its moments on disk."""
    made = recipe(tmp_path, {"held_out": 0.25}, {"optimizer": "paged", "steps": 3, "seed": 1})
    return {
        "model": tiny("llama"),
        "recipe": made,
        "samples": 6,
        "tokens": 24,
        "device": "cpu",
        "dtype": "float32",
        "eval_windows": 0,
    }


def written(out: Path) -> tuple[bytes, Any]:
    record = json.loads((out / "lilliput.json").read_text())
    curves = [{k: v for k, v in x.items() if k != "seconds"} for x in record["training"]]
    return (out / "model.safetensors").read_bytes(), curves


@pytest.fixture
def whole(driver: Driver, args: dict[str, Any], tmp_path: Path) -> tuple[bytes, Any]:
    done = driver(args={**args, "out": tmp_path / "whole"})
    assert done["code"] == 0, done["stderr"]
    found = written(tmp_path / "whole")
    assert [len(x["losses"]) for x in found[1]] == [5, 3]
    return found


def test_killed_training_goes_on(driver: Driver, args: dict[str, Any], whole: Any, tmp_path: Path) -> None:
    kills = [
        ("lilliput.streaming.states:Activations.checksum", 2, "before"),
        ("lilliput.training.teacher:Notes.write", 3, "before"),
        ("lilliput.training.whole:Whole.step", 2, "before"),
        ("lilliput.training.whole:Whole.step", 4, "after"),
        ("lilliput.training.whole:Whole.save", 2, "after"),
        ("lilliput.training.whole:Whole.keep", 1, "before"),
        ("lilliput.training.moments:OnDisk.put", 30, "after"),
        ("lilliput.training.moments:OnDisk.settled", 1, "before"),
        ("lilliput.run.training:_written", 1, "before"),
        ("lilliput.run.training:_written", 1, "after"),
        ("lilliput.run.training:_written", 2, "after"),
        ("lilliput.run.training:exchange", 2, "before"),
        ("lilliput.run.training:exchange", 2, "after"),
        ("shutil:rmtree", 5, "after"),
        ("lilliput.run.delivery:write_report", 1, "before"),
    ]
    for n, (at, call, how) in enumerate(kills):
        out = tmp_path / f"out-{n}"
        killed = driver(args={**args, "out": out}, at=at, call=call, how=how)
        assert killed["code"] in (-9, 0), killed["stderr"]
        again = driver(args={**args, "out": out})
        if killed["code"] == -9:
            assert again["code"] == 0, (at, call, again["stderr"])
        assert written(out) == whole, (at, call, how)
        assert not (tmp_path / f".out-{n}.partial").exists()


def test_a_first_interrupt_exports_and_a_second_can_be_gone_on_with(
    driver: Driver, args: dict[str, Any], whole: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ended = driver(args={**args, "out": out}, at="lilliput.training.whole:Whole.step", call=3, how="interrupt")
    assert ended["code"] == 0, ended["stderr"]
    curves = written(out)[1]
    assert curves[0]["stopped"] == "by the keyboard, at step 3 of 5"
    assert len(curves[1]["losses"]) == 3
    assert api.verify(out).whole


def test_a_full_disk_loses_nothing(driver: Driver, args: dict[str, Any], whole: Any, tmp_path: Path) -> None:
    for n, (at, call) in enumerate([("lilliput.training.whole:Whole.save", 2), ("shutil:copyfile", 5)]):
        out = tmp_path / f"out-{n}"
        full = driver(args={**args, "out": out}, at=at, call=call, how="refuse")
        assert full["code"] == 70
        assert "the disk is full" in full["stderr"]
        assert "nothing is lost" in full["stderr"]
        again = driver(args={**args, "out": out})
        assert again["code"] == 0, again["stderr"]
        assert written(out) == whole


def test_another_plan_is_refused(driver: Driver, args: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert (
        driver(args={**args, "out": out}, at="lilliput.training.whole:Whole.step", call=4, how="before")["code"] == -9
    )
    other = recipe(tmp_path, {"lr": 0.004})
    refused = driver(args={**args, "out": out, "recipe": other})
    assert refused["code"] == 70
    assert "unfinished run of another plan" in refused["stderr"]
    assert os.listdir(tmp_path / ".out.partial" / "work")
