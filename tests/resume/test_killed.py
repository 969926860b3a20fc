"""kill -9 at every phase of a run, then the same call again: the same bytes, and at most one block done twice."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lilliput import api

BLOCKS = 4
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


@pytest.fixture(scope="module")
def driver(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    made = Driver(tmp_path_factory.mktemp("stderr"), tiny("llama"))
    yield made
    made.close()


def weights(folder: Path) -> dict[str, str]:
    return {x.name: hashlib.sha256(x.read_bytes()).hexdigest() for x in sorted(folder.glob("*.safetensors"))}


def squeezed(model: Path, recipe: str) -> int:
    """A memory budget under which the sites of a block are reached by running it again, not all at once."""
    room = {key: (SAME | MANY)[key] for key in ("samples", "tokens", "device", "dtype")}
    plan = api.plan(model, recipe=recipe, **room)
    while plan.layout.lockstep:
        plan = api.plan(model, recipe=recipe, memory=plan.layout.bytes - 1, **room)
    assert plan.budget is not None
    return plan.budget


@dataclass(frozen=True)
class Unbroken:
    """What a run that nobody disturbs is called with, and what it writes."""

    args: dict[str, Any]
    weights: dict[str, str]


@pytest.fixture(scope="module")
def unbroken(tiny: Tiny, driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Unbroken]:
    found: dict[tuple[str, bool], Unbroken] = {}

    def make(recipe: str, tight: bool) -> Unbroken:
        key = recipe, tight
        if key not in found:
            out = tmp_path_factory.mktemp("unbroken") / "out"
            args = {"model": tiny("llama"), "recipe": recipe, **SAME, "settings": QUICK[recipe]}
            if tight:
                args |= {**MANY, "memory": squeezed(tiny("llama"), recipe)}
            done = driver(args={**args, "out": out})
            assert done["code"] == 0, done["stderr"]
            assert done["lockstep"] is not tight or recipe == "magnitude"
            found[key] = Unbroken(args, weights(out))
        return found[key]

    return make


# recipe, small memory?, call to kill at, how-manieth, how, blocks that are finished by then
KILLS: list[tuple[str, bool, str, int, str, int]] = [
    # reading
    ("gptq", False, "lilliput.source.source:Source.scan", 1, "before", 0),
    ("gptq", False, "lilliput.model:Model.read", 25, "before", 1),
    ("magnitude", False, "lilliput.model:Model.read", 12, "after", 1),
    # calibrating
    ("gptq", False, "lilliput.stats.fold:update", 6, "before", 1),
    ("gptq", True, "lilliput.stats.fold:update", 20, "after", 1),
    ("awq-gptq", False, "lilliput.stats.fold:update", 9, "before", 1),
    ("gptq", False, "lilliput.activations:Activations.write", 3, "before", 1),
    ("gptq", True, "lilliput.activations:Activations.write", 14, "after", 2),
    # solving
    ("gptq", False, "lilliput.methods.weight.gptq:compress", 16, "before", 3),
    ("gptq", True, "lilliput.methods.weight.gptq:compress", 7, "after", 1),
    ("awq-gptq", False, "lilliput.methods.rewrite.awq:rewrite", 3, "before", 2),
    ("magnitude", False, "lilliput.methods.weight.magnitude:compress", 24, "after", 3),
    # writing a shard: the first call writes what lies outside the blocks
    ("gptq", False, "lilliput.journal:save_file", 1, "torn", 0),
    ("gptq", False, "lilliput.journal:save_file", 3, "torn", 1),
    ("awq-gptq", False, "lilliput.journal:save_file", 5, "after", 3),
    ("magnitude", False, "pathlib:Path.replace", 4, "before", 1),
    ("gptq", False, "pathlib:Path.replace", 4, "after", 1),
    # writing the journal
    ("gptq", False, "lilliput.journal:write_atomically", 1, "before", 0),
    ("gptq", False, "lilliput.journal:Work.note", 1, "torn", 0),
    ("gptq", True, "lilliput.journal:Work.note", 4, "torn", 2),
    ("awq-gptq", False, "lilliput.journal:Work.note", 5, "before", 3),
    # between the journal and the end of the hidden states that went in
    ("gptq", False, "lilliput.activations:Activations.delete", 2, "before", 2),
    ("gptq", True, "lilliput.activations:Activations.delete", 4, "after", 4),
    # writing the files beside the weights
    ("gptq", False, "shutil:copyfile", 1, "after", 4),
    ("magnitude", False, "lilliput.export.folder:_write", 3, "before", 4),
    # renaming, and clearing up after it
    ("gptq", False, "pathlib:Path.rename", 1, "before", 4),
    ("awq-gptq", False, "pathlib:Path.rename", 1, "after", 4),
    ("gptq", False, "lilliput.journal:Work._clear", 1, "before", 4),
]


@pytest.mark.parametrize(
    ("recipe", "tight", "at", "call", "how", "blocks"),
    KILLS,
    ids=[f"{k[0]}-{k[2].split(':')[1]}-{k[3]}" for k in KILLS],
)
def test_killed_runs_go_on(
    driver: Driver,
    unbroken: Callable[[str, bool], Unbroken],
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
        assert weights(out) == whole.weights
    again = driver(args={**whole.args, "out": out})
    assert again["code"] == 0, again["stderr"]
    assert weights(out) == whole.weights
    assert again["skipped"] == blocks
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("at", "how"), [("lilliput.metrics.evaluate:score", "before"), ("lilliput.api:measure", "after")]
)
def test_killed_while_measuring(
    driver: Driver, unbroken: Callable[[str, bool], Unbroken], tmp_path: Path, at: str, how: str
) -> None:
    whole = unbroken("gptq", False)
    out = tmp_path / "out"
    args = {**whole.args, "out": out, "eval_windows": 2}
    killed = driver(args=args, at=at, call=1, how=how)
    assert killed["code"] == -9, killed["stderr"]
    again = driver(args=args)
    assert again["code"] == 0, again["stderr"]
    assert again["skipped"] == BLOCKS
    assert weights(out) == whole.weights
    assert json.loads((out / "lilliput.json").read_text())["measured"]["perplexity_ratio"]["value"] > 0
    assert os.listdir(tmp_path) == ["out"]


def test_killed_twice(driver: Driver, unbroken: Callable[[str, bool], Unbroken], tmp_path: Path) -> None:
    whole = unbroken("awq-gptq", False)
    args = {**whole.args, "out": tmp_path / "out"}
    gptq = "lilliput.methods.weight.gptq:compress"
    assert driver(args=args, at=gptq, call=6, how="before")["code"] == -9
    # A resumed run that dies has block 1 behind it and is in block 2.
    assert driver(args=args, at=gptq, call=6, how="before")["code"] == -9
    again = driver(args=args)
    assert again["skipped"] == 2
    assert weights(tmp_path / "out") == whole.weights


def half_done(driver: Driver, whole: Unbroken, out: Path, **more: Any) -> dict[str, Any]:
    """Arguments of a run that was killed in block 2."""
    args = {**whole.args, "out": out, **more}
    killed = driver(args=args, at="lilliput.methods.weight.gptq:compress", call=10, how="before")
    assert killed["code"] == -9, killed["stderr"]
    return args


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(x.relative_to(folder)): x.read_bytes() for x in sorted(folder.rglob("*")) if x.is_file()}


def test_another_plan_is_refused(driver: Driver, unbroken: Callable[[str, bool], Unbroken], tmp_path: Path) -> None:
    args = half_done(driver, unbroken("gptq", False), tmp_path / "out")
    before = snapshot(tmp_path)
    for change in ({"samples": 3}, {"settings": ("gptq.bits=3",)}, {"dtype": "bfloat16"}):
        refused = driver(args={**args, **change})
        assert "LilliputError" in refused["stderr"]
        assert "unfinished run of another plan" in refused["stderr"]
        assert snapshot(tmp_path) == before


def line(whole: Unbroken, out: Path, *more: str) -> list[str]:
    args = whole.args
    fixed = ["--samples", "4", "--tokens", "32", "--device", "cpu", "--dtype", "float32", "--json"]
    fixed += [x for setting in args["settings"] for x in ("--set", setting)]
    return ["compress", str(args["model"]), "--out", str(out), "--recipe", args["recipe"], *fixed, *more]


def test_interrupted(driver: Driver, unbroken: Callable[[str, bool], Unbroken], tmp_path: Path) -> None:
    whole = unbroken("gptq", False)
    command = line(whole, tmp_path / "out")
    stopped = driver(line=command, at="lilliput.methods.weight.gptq:compress", call=6, how="interrupt")
    assert stopped["code"] == 130, stopped["stderr"]
    last = stopped["stderr"].strip().splitlines()[-1]
    assert last == "interrupted. Run the same command again: it goes on after the last finished block."
    assert "Traceback" not in stopped["stderr"]
    again = driver(line=command)
    assert again["code"] == 0, again["stderr"]
    assert '"blocks_skipped": 1' in again["stderr"]
    assert weights(tmp_path / "out") == whole.weights


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"), "is not what the unfinished run wrote"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "is shorter than"),
        (lambda path: path.unlink(), "is gone"),
    ],
    ids=["flipped", "short", "gone"],
)
def test_damaged_hidden_states(
    driver: Driver,
    unbroken: Callable[[str, bool], Unbroken],
    tmp_path: Path,
    damage: Callable[[Path], None],
    said: str,
) -> None:
    whole = unbroken("gptq", False)
    half_done(driver, whole, tmp_path / "out")
    damage(tmp_path / ".out.partial" / "work" / "hidden-0002.bin")
    refused = driver(line=line(whole, tmp_path / "out"))
    assert refused["code"] == 2
    last = refused["stderr"].strip().splitlines()[-1]
    assert said in last
    assert "start anew" in last
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / ".out.partial")
    assert driver(args={**whole.args, "out": tmp_path / "out"})["skipped"] == 0


def test_a_finished_shard_that_is_gone(
    driver: Driver, unbroken: Callable[[str, bool], Unbroken], tmp_path: Path
) -> None:
    whole = unbroken("gptq", False)
    half_done(driver, whole, tmp_path / "out")
    next((tmp_path / ".out.partial" / "model").glob("model-00002*")).unlink()
    refused = driver(line=line(whole, tmp_path / "out"))
    assert refused["code"] == 2
    assert "model-00002-of-00005.safetensors was written by the unfinished run and is gone" in refused["stderr"]


def test_two_runs_on_one_folder(driver: Driver, unbroken: Callable[[str, bool], Unbroken], tmp_path: Path) -> None:
    whole = unbroken("gptq", False)
    gates = tmp_path / "gates"
    gates.mkdir()
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    first = driver(
        args={**whole.args, "out": out},
        at="lilliput.methods.weight.gptq:compress",
        call=6,
        how="hold",
        reached=gates / "reached",
        until=gates / "until",
        background=True,
    )
    deadline = time.monotonic() + 60
    while not (gates / "reached").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    before = snapshot(out.parent)
    second = driver(line=line(whole, out))
    assert second["code"] == 2
    assert "another run is writing" in second["stderr"].strip().splitlines()[-1]
    elsewhere = driver(line=line(whole, out, "--work", str(tmp_path / "work")))
    assert elsewhere["code"] == 2
    assert snapshot(out.parent) == before
    (gates / "until").touch()
    done = driver(wait=first["job"])
    assert done["code"] == 0, done["stderr"]
    assert weights(out) == whole.weights


@pytest.mark.parametrize("kind", ["folder", "empty", "file", "dangling"])
def test_an_output_that_exists(
    driver: Driver, unbroken: Callable[[str, bool], Unbroken], tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "dangling":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "mine.txt").write_text("mine")
    before = snapshot(tmp_path)
    refused = driver(line=line(unbroken("gptq", False), out), at="lilliput.api:open_model", call=1, how="before")
    assert refused["code"] == 2  # before the model was opened
    assert "exists already" in refused["stderr"]
    assert snapshot(tmp_path) == before
    assert os.listdir(tmp_path) == ["out"]


def test_an_output_that_appears_meanwhile(
    driver: Driver, unbroken: Callable[[str, bool], Unbroken], tmp_path: Path
) -> None:
    whole = unbroken("gptq", False)
    args = half_done(driver, whole, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    refused = driver(args=args)
    assert "exists already" in refused["stderr"]
    assert snapshot(tmp_path / "out") == {"mine.txt": b"mine"}
    (tmp_path / "out").rename(tmp_path / "other")
    assert driver(args=args)["skipped"] == 2
    assert weights(tmp_path / "out") == whole.weights


def test_work_in_another_folder(driver: Driver, unbroken: Callable[[str, bool], Unbroken], tmp_path: Path) -> None:
    whole = unbroken("gptq", False)
    work = tmp_path / "work"
    (work / "out.work").mkdir(parents=True)
    (work / "out.work" / "mine.txt").write_text("mine")
    (work / "journal.jsonl").write_text("mine")
    before = snapshot(work)
    places = [tmp_path / "a" / "out", tmp_path / "b" / "out"]
    for out in places:
        out.parent.mkdir()
        half_done(driver, whole, out, work=work)
        assert not list((out.parent / ".out.partial").rglob("hidden*"))
    assert len(list(work.rglob("hidden-0002.bin"))) == 2
    # The journal is where it was begun: without --work, or with another, the run is not thrown away.
    lost = driver(line=line(whole, places[0]))
    assert lost["code"] == 2
    assert "repeat that command with its --work" in lost["stderr"]
    for out in places:
        done = driver(args={**whole.args, "out": out, "work": work})
        assert done["skipped"] == 2
        assert weights(out) == whole.weights
        assert os.listdir(out.parent) == ["out"]
    assert snapshot(work) == before
    assert sorted(os.listdir(work)) == ["journal.jsonl", "out.work"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a small disk of so many bytes."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a full disk is tried on a small tmpfs, which only root may mount")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_too_little_space_is_refused_before_the_work(
    driver: Driver, unbroken: Callable[[str, bool], Unbroken], disk: Callable[[int], Path]
) -> None:
    place = disk(200_000)
    refused = driver(line=line(unbroken("gptq", False), place / "out"))
    assert refused["code"] == 2
    last = refused["stderr"].strip().splitlines()[-1]
    assert "free but" in last
    assert "more: free some space" in last
    assert os.listdir(place) == []


@pytest.mark.parametrize(
    ("at", "call"),
    [
        ("lilliput.journal:save_file", 3),
        ("lilliput.journal:Work.note", 3),
        ("lilliput.stream:Activations", 3),
        ("lilliput.delivery:write_side_files", 1),
        ("lilliput.api:measure", 1),
    ],
)
def test_a_disk_that_fills_up_meanwhile(
    driver: Driver,
    unbroken: Callable[[str, bool], Unbroken],
    disk: Callable[[int], Path],
    at: str,
    call: int,
) -> None:
    whole = unbroken("gptq", False)
    place = disk(4_000_000)
    command = line(whole, place / "out")
    full = driver(line=command, at=at, call=call, how="fill", disk=place)
    assert full["code"] == 2, full["stderr"]
    said = [x for x in full["stderr"].splitlines() if "blocks " not in x]
    assert len(said) == 1, full["stderr"]
    assert "the disk is full" in said[0]
    assert "it goes on where it stopped" in said[0]
    assert not (place / "out").exists()
    (place / "ballast").unlink()
    again = driver(line=command)
    assert again["code"] == 0, again["stderr"]
    assert weights(place / "out") == whole.weights
    assert os.listdir(place) == ["out"]
