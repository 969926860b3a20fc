"""What a run that goes on, or begins, meets on the disk: other plans and runs, damage, things in its place, no room."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

Driver = Callable[..., dict[str, Any]]
Whole = Callable[..., Any]


def half_done(driver: Driver, whole: Any, out: Path, shard: int | None = None, **more: Any) -> dict[str, Any]:
    """Arguments of a run that was killed in block 2."""
    args = {**whole.args, "out": out, **more}
    job: dict[str, Any] = {} if shard is None else {"shard": shard}
    killed = driver(args=args, at="lilliput.methods.weight.gptq:METHOD.run", call=10, how="before", **job)
    assert killed["code"] == -9, killed["stderr"]
    return args


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(x.relative_to(folder)): x.read_bytes() for x in sorted(folder.rglob("*")) if x.is_file()}


def test_another_plan_is_refused(driver: Driver, unbroken: Whole, tmp_path: Path) -> None:
    args = half_done(driver, unbroken("gptq", False), tmp_path / "out")
    before = snapshot(tmp_path)
    for change in ({"samples": 3}, {"settings": ("gptq.bits=3",)}, {"dtype": "bfloat16"}):
        refused = driver(args={**args, **change})
        assert "LilliputError" in refused["stderr"]
        assert "unfinished run of another plan" in refused["stderr"]
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"), "is not what the unfinished run wrote"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "is shorter than"),
        (lambda path: path.unlink(), "is missing"),
    ],
    ids=["flipped", "short", "gone"],
)
def test_damaged_hidden_states(
    driver: Driver,
    unbroken: Whole,
    tmp_path: Path,
    damage: Callable[[Path], None],
    said: str,
) -> None:
    whole = unbroken("gptq", False)
    half_done(driver, whole, tmp_path / "out")
    damage(tmp_path / ".out.partial" / "work" / "hidden-0002.bin")
    refused = driver(line=whole.line(tmp_path / "out"))
    assert refused["code"] == 2
    last = refused["stderr"].strip().splitlines()[-1]
    assert said in last
    assert "start again" in last
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / ".out.partial")
    assert driver(args={**whole.args, "out": tmp_path / "out"})["skipped"] == 0


def garble(path: Path, tensor: str) -> None:
    """Change the last byte of a tensor."""
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    end = json.loads(content[8 : 8 + length])[tensor]["data_offsets"][1]
    content[8 + length + end - 1] ^= 0x55
    path.write_bytes(content)


DONE, OPEN = (f"model.layers.{n}.mlp.up_proj.weight_packed" for n in (1, 2))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "model.safetensors.part was written by the unfinished run and is missing"),
        (lambda path: os.truncate(path, path.stat().st_size - 8), "model.safetensors.part is not what the unfinished"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "model.safetensors.part is not what the unfinished"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "model.safetensors.part is not what the unfinish"),
        (lambda path: garble(path, "model.embed_tokens.weight"), "model.embed_tokens.weight in "),
        (lambda path: garble(path, DONE), f"{DONE} in "),
    ],
    ids=["gone", "short", "long", "empty", "outside", "block"],
)
def test_damaged_output(
    driver: Driver, unbroken: Whole, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    whole = unbroken("gptq", False)
    half_done(driver, whole, tmp_path / "out")
    damage(tmp_path / ".out.partial" / "model" / "model.safetensors.part")
    refused = driver(line=whole.line(tmp_path / "out"))
    assert refused["code"] == 2
    last = refused["stderr"].strip().splitlines()[-1]
    assert said in last
    assert "start again" in last
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_of_several(driver: Driver, unbroken: Whole, tmp_path: Path) -> None:
    args = half_done(driver, unbroken("gptq", False), tmp_path / "out", shard=30_000)
    path = next((tmp_path / ".out.partial" / "model").glob("model-00002-of-*"))
    os.truncate(path, 100)
    refused = driver(args=args, shard=30_000)
    assert f"{path} is not what the unfinished run wrote" in refused["stderr"]


def test_what_is_not_finished_is_written_again(driver: Driver, unbroken: Whole, tmp_path: Path) -> None:
    whole = unbroken("gptq", False)
    args = half_done(driver, whole, tmp_path / "out")
    garble(tmp_path / ".out.partial" / "model" / "model.safetensors.part", OPEN)
    assert driver(args=args)["skipped"] == 2
    assert whole.weights_of(tmp_path / "out") == whole.weights


def test_two_runs_on_one_folder(driver: Driver, unbroken: Whole, tmp_path: Path) -> None:
    whole = unbroken("gptq", False)
    gates = tmp_path / "gates"
    gates.mkdir()
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    first = driver(
        args={**whole.args, "out": out},
        at="lilliput.methods.weight.gptq:METHOD.run",
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
    second = driver(line=whole.line(out))
    assert second["code"] == 2
    assert "another run is writing" in second["stderr"].strip().splitlines()[-1]
    elsewhere = driver(line=whole.line(out, "--work", str(tmp_path / "work")))
    assert elsewhere["code"] == 2
    assert snapshot(out.parent) == before
    (gates / "until").touch()
    done = driver(wait=first["job"])
    assert done["code"] == 0, done["stderr"]
    assert whole.weights_of(out) == whole.weights


@pytest.mark.parametrize("kind", ["folder", "empty", "file", "dangling"])
def test_an_output_that_exists(driver: Driver, unbroken: Whole, tmp_path: Path, kind: str) -> None:
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
    refused = driver(line=unbroken("gptq", False).line(out), at="lilliput.run.session:open_model", call=1, how="before")
    assert refused["code"] == 2  # before the model was opened
    assert "exists already" in refused["stderr"]
    assert snapshot(tmp_path) == before
    assert os.listdir(tmp_path) == ["out"]


def test_an_output_that_appears_meanwhile(driver: Driver, unbroken: Whole, tmp_path: Path) -> None:
    whole = unbroken("gptq", False)
    args = half_done(driver, whole, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    refused = driver(args=args)
    assert "exists already" in refused["stderr"]
    assert snapshot(tmp_path / "out") == {"mine.txt": b"mine"}
    (tmp_path / "out").rename(tmp_path / "other")
    assert driver(args=args)["skipped"] == 2
    assert whole.weights_of(tmp_path / "out") == whole.weights


def test_work_in_another_folder(driver: Driver, unbroken: Whole, tmp_path: Path) -> None:
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
    lost = driver(line=whole.line(places[0]))
    assert lost["code"] == 2
    assert "repeat that command with its --work" in lost["stderr"]
    for out in places:
        done = driver(args={**whole.args, "out": out, "work": work})
        assert done["skipped"] == 2
        assert whole.weights_of(out) == whole.weights
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
    driver: Driver, unbroken: Whole, disk: Callable[[int], Path]
) -> None:
    place = disk(200_000)
    refused = driver(line=unbroken("gptq", False).line(place / "out"))
    assert refused["code"] == 2
    last = refused["stderr"].strip().splitlines()[-1]
    assert "free but" in last
    assert "more: free some space" in last
    assert os.listdir(place) == []


@pytest.mark.parametrize(
    ("at", "call", "how"),
    [
        ("lilliput.run.output:Output.lay_out", 1, "fill"),
        ("lilliput.run.output:Output.write", 3, "fill"),
        # Space that was reserved can be missing all the same, as where files are copied on write.
        ("lilliput.run.output:_write_at", 40, "refuse"),
        ("lilliput.run.journal:Work.note", 3, "fill"),
        ("lilliput.streaming.walk:Activations", 3, "fill"),
        ("lilliput.run.delivery:write_side_files", 1, "fill"),
        ("lilliput.run.session:measure", 1, "fill"),
    ],
)
def test_a_disk_that_fills_up_meanwhile(
    driver: Driver,
    unbroken: Whole,
    disk: Callable[[int], Path],
    at: str,
    call: int,
    how: str,
) -> None:
    whole = unbroken("gptq", False)
    place = disk(4_000_000)
    command = whole.line(place / "out")
    full = driver(line=command, at=at, call=call, how=how, disk=place)
    assert full["code"] == 2, full["stderr"]
    said = [x for x in full["stderr"].splitlines() if "blocks " not in x]
    assert len(said) == 1, full["stderr"]
    assert "the disk is full" in said[0]
    assert "which continues where it stopped" in said[0]
    assert not (place / "out").exists()
    (place / "ballast").unlink(missing_ok=True)
    again = driver(line=command)
    assert again["code"] == 0, again["stderr"]
    assert whole.weights_of(place / "out") == whole.weights
    assert os.listdir(place) == ["out"]
