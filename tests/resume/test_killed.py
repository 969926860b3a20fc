"""kill -9 at every phase of a run, then the same call again: the same bytes, and at most one block done twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lilliput.errors import LilliputError
from lilliput.model.stored import open_model

pytestmark = pytest.mark.slow

BLOCKS = 4
OUTSIDE = 1 + 2  # header, embedding and final norm
TENSORS = 7 * 3 + 2  # of a block: codes, scales and shapes of its linears, and its norms
SMALL = 30_000  # bytes of a file: the embedding exceeds it, and files end within blocks
Driver = Callable[..., dict[str, Any]]
Whole = Callable[..., Any]

# recipe, small memory?, call to kill at, how-manieth, how, blocks that are finished by then
KILLS: list[tuple[str, bool, str, int, str, int]] = [
    # reading
    ("gptq", False, "lilliput.source.source:Source.scan", 1, "before", 0),
    ("gptq", False, "lilliput.model.stored:StoredModel.read", 25, "before", 1),
    ("magnitude", False, "lilliput.model.stored:StoredModel.read", 12, "after", 1),
    # calibrating
    ("gptq", False, "lilliput.stats.fold:update", 6, "before", 1),
    ("gptq", True, "lilliput.stats.fold:update", 20, "after", 1),
    ("awq-gptq", False, "lilliput.stats.fold:update", 9, "before", 1),
    ("gptq", False, "lilliput.streaming.states:Activations.write", 3, "before", 1),
    ("gptq", True, "lilliput.streaming.states:Activations.write", 14, "after", 2),
    # solving
    ("gptq", False, "lilliput.methods.weight.gptq:METHOD.run", 16, "before", 3),
    ("gptq", True, "lilliput.methods.weight.gptq:METHOD.run", 7, "after", 1),
    ("awq-gptq", False, "lilliput.methods.rewrite.awq:METHOD.run", 3, "before", 2),
    ("magnitude", False, "lilliput.methods.weight.magnitude:METHOD.run", 24, "after", 3),
    # writing tensors: the first call of `write` is for those outside the blocks, the first of `_write_at` the header
    ("gptq", False, "os:posix_fallocate", 1, "before", 0),
    ("gptq", False, "lilliput.run.output:_write_at", 1, "torn", 0),
    ("gptq", False, "lilliput.run.output:_write_at", 2, "torn", 0),
    ("gptq", False, "lilliput.run.output:_write_at", OUTSIDE + TENSORS + 10, "torn", 1),
    ("gptq", True, "lilliput.run.output:_write_at", OUTSIDE + 3 * TENSORS, "torn", 2),
    ("awq-gptq", False, "lilliput.run.output:Output.write", 5, "after", 3),
    ("magnitude", False, "lilliput.run.output:Output.write", 3, "before", 1),
    ("gptq", False, "lilliput.run.output:Output.write", 3, "after", 1),
    # writing the journal
    ("gptq", False, "lilliput.run.journal:write_atomically", 1, "before", 0),
    ("gptq", False, "lilliput.run.journal:Work.note", 1, "torn", 0),
    ("gptq", True, "lilliput.run.journal:Work.note", 4, "torn", 2),
    ("awq-gptq", False, "lilliput.run.journal:Work.note", 5, "before", 3),
    # between the journal and the end of the hidden states that went in
    ("gptq", False, "lilliput.streaming.states:Activations.delete", 2, "before", 2),
    ("gptq", True, "lilliput.streaming.states:Activations.delete", 4, "after", 4),
    # writing the files beside the weights
    ("gptq", False, "shutil:copyfile", 1, "after", 4),
    ("magnitude", False, "lilliput.export.folder:_write", 3, "before", 4),
    # renaming the file of the weights and then the folder, and clearing up after it
    ("gptq", False, "pathlib:Path.rename", 1, "before", 4),
    ("gptq", False, "pathlib:Path.rename", 1, "after", 4),
    ("gptq", False, "pathlib:Path.rename", 2, "before", 4),
    ("awq-gptq", False, "pathlib:Path.rename", 2, "after", 4),
    ("gptq", False, "lilliput.run.journal:Work._clear", 1, "before", 4),
]


@pytest.mark.parametrize(
    ("recipe", "tight", "at", "call", "how", "blocks"),
    KILLS,
    ids=[f"{k[0]}-{k[2].split(':')[1]}-{k[3]}" for k in KILLS],
)
def test_killed_runs_go_on(
    driver: Driver,
    unbroken: Whole,
    tmp_path: Path,
    recipe: str,
    tight: bool,
    at: str,
    call: int,
    how: str,
    blocks: int,
) -> None:
    whole = unbroken(recipe, tight)
    out = tmp_path / "out"
    killed = driver(args={**whole.args, "out": out}, at=at, call=call, how=how)
    assert killed["code"] == -9, killed["stderr"]
    if out.exists():
        assert whole.weights_of(out) == whole.weights
    again = driver(args={**whole.args, "out": out})
    assert again["code"] == 0, again["stderr"]
    assert whole.weights_of(out) == whole.weights
    assert again["skipped"] == blocks
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("at", "call", "how", "blocks"),
    [
        ("lilliput.run.output:Output._locate", 2, "before", 0),
        ("lilliput.run.output:_write_at", 5 + OUTSIDE + TENSORS + 5, "torn", 1),
        ("lilliput.run.output:_write_at", 5 + OUTSIDE + 2 * TENSORS - 1, "torn", 1),
        ("lilliput.run.journal:Work.note", 3, "before", 1),
        ("pathlib:Path.rename", 2, "after", 4),
        ("lilliput.run.delivery:write_index", 1, "before", 4),
        ("lilliput.run.journal:Work._clear", 1, "before", 4),
    ],
)
def test_killed_runs_of_several_files(
    driver: Driver, unbroken: Whole, tmp_path: Path, at: str, call: int, how: str, blocks: int
) -> None:
    args = {**unbroken("gptq", False).args, "out": tmp_path / "out"}
    whole = unbroken("gptq", False, SMALL)
    assert len(whole.weights) > 4
    killed = driver(args=args, shard=SMALL, at=at, call=call, how=how)
    assert killed["code"] == -9, killed["stderr"]
    again = driver(args=args, shard=SMALL)
    assert again["code"] == 0, again["stderr"]
    assert whole.weights_of(tmp_path / "out") == whole.weights
    assert again["skipped"] == blocks
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(whole.weights)


@pytest.mark.parametrize("shard", [None, SMALL])
def test_nothing_takes_an_unfinished_run_for_a_model(
    driver: Driver, unbroken: Whole, tmp_path: Path, shard: int | None
) -> None:
    args = {**unbroken("gptq", False).args, "out": tmp_path / "out"}
    job = {} if shard is None else {"shard": shard}
    assert driver(args=args, at="lilliput.run.output:Output.finish", call=1, how="before", **job)["code"] == -9
    assert os.listdir(tmp_path) == [".out.partial"]
    for folder in (tmp_path / ".out.partial", tmp_path / ".out.partial" / "model"):
        with pytest.raises(LilliputError):
            open_model(str(folder))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("at", "how"), [("lilliput.metrics.evaluate:score", "before"), ("lilliput.run.session:measure", "after")]
)
def test_killed_while_measuring(driver: Driver, unbroken: Whole, tmp_path: Path, at: str, how: str) -> None:
    whole = unbroken("gptq", False)
    out = tmp_path / "out"
    args = {**whole.args, "out": out, "eval_windows": 2}
    killed = driver(args=args, at=at, call=1, how=how)
    assert killed["code"] == -9, killed["stderr"]
    again = driver(args=args)
    assert again["code"] == 0, again["stderr"]
    assert again["skipped"] == BLOCKS
    assert whole.weights_of(out) == whole.weights
    assert json.loads((out / "lilliput.json").read_text())["measured"]["perplexity_ratio"]["value"] > 0
    assert os.listdir(tmp_path) == ["out"]


def test_killed_twice(driver: Driver, unbroken: Whole, tmp_path: Path) -> None:
    whole = unbroken("awq-gptq", False)
    args = {**whole.args, "out": tmp_path / "out"}
    gptq = "lilliput.methods.weight.gptq:METHOD.run"
    assert driver(args=args, at=gptq, call=6, how="before")["code"] == -9
    # A resumed run that dies has finished block 1 and is in block 2.
    assert driver(args=args, at=gptq, call=6, how="before")["code"] == -9
    again = driver(args=args)
    assert again["skipped"] == 2
    assert whole.weights_of(tmp_path / "out") == whole.weights


@pytest.mark.parametrize(
    ("at", "call"),
    [("lilliput.methods.weight.gptq:METHOD.run", 6), ("lilliput.run.output:_write_at", OUTSIDE + TENSORS + 10)],
)
def test_interrupted(driver: Driver, unbroken: Whole, tmp_path: Path, at: str, call: int) -> None:
    whole = unbroken("gptq", False)
    command = whole.line(tmp_path / "out")
    stopped = driver(line=command, at=at, call=call, how="interrupt")
    assert not (tmp_path / "out").exists()
    assert stopped["code"] == 130, stopped["stderr"]
    last = stopped["stderr"].strip().splitlines()[-1]
    assert last == "interrupted. Run the same command again: it continues after the last finished block."
    assert "Traceback" not in stopped["stderr"]
    again = driver(line=command)
    assert again["code"] == 0, again["stderr"]
    assert '"blocks_skipped": 1' in again["stderr"]
    assert whole.weights_of(tmp_path / "out") == whole.weights
