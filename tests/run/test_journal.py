import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lilliput.errors import BusyError, LilliputError, PlanError
from lilliput.run.journal import Work, first_facts, partial_of, save_atomically, work_of, write_atomically


def test_records_outlive_the_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Work(out, "plan", facts={"batch": 3}) as work:
        work.note({"kind": "block", "block": 0})
        work.note({"kind": "outside", "shard": 0})
    assert first_facts(out, None) == {"batch": 3, "plan": "plan"}
    with Work(out, "plan") as work:
        assert work.find("block") == [{"kind": "block", "block": 0}]
        (work.staging / "weights").write_text("w")
        (work.staging / ".weights.new").write_text("half")
        work.publish()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(out) == ["weights"]
    assert first_facts(out, None) == {}


@pytest.mark.parametrize("tail", ['{"kind": "blo', '{"kind": "block", "block": 1}{"kind"', "\0\0\0", "[1]\n", "é"])
def test_a_torn_line_is_cut_off(tmp_path: Path, tail: str) -> None:
    out = tmp_path / "out"
    with Work(out, "plan") as work:
        work.note({"kind": "block", "block": 0})
    path = work.folder / "journal.jsonl"
    path.write_bytes(path.read_bytes() + tail.encode())
    with Work(out, "plan") as work:
        assert [x["block"] for x in work.find("block")] == [0]
        work.note({"kind": "block", "block": 1})
    with Work(out, "plan") as work:
        assert [x["block"] for x in work.find("block")] == [0, 1]


def test_a_line_without_its_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Work(out, "plan") as work:
        work.note({"kind": "block", "block": 0})
    path = work.folder / "journal.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    with Work(out, "plan") as work:
        work.note({"kind": "block", "block": 1})
    with Work(out, "plan") as work:
        assert [x["block"] for x in work.find("block")] == [0, 1]


def test_one_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Work(out, "plan") as work:
        work.note({"kind": "x"})
        with pytest.raises(BusyError, match="another run is writing"), Work(out, "plan"):
            pass
        with pytest.raises(BusyError), Work(out, "plan", tmp_path / "elsewhere"):
            pass
        work.note({"kind": "x"})
    with Work(out, "plan") as work:
        assert len(work.find("x")) == 2


def test_other_plans(tmp_path: Path) -> None:
    with Work(tmp_path / "out", "plan") as work:
        work.note({"kind": "x"})
    with pytest.raises(LilliputError, match=r"\.out\.partial holds an unfinished run of another plan"):
        Work(tmp_path / "out", "other").__enter__()
    with Work(tmp_path / "out", "plan") as work:
        assert work.find("x")


def test_a_journal_that_is_none(tmp_path: Path) -> None:
    with Work(tmp_path / "out", "plan") as work:
        work.note({"kind": "x"})
    (work.folder / "journal.jsonl").write_bytes(b"\xff\xfe not json")
    with pytest.raises(LilliputError, match="another plan"):
        Work(tmp_path / "out", "plan").__enter__()
    assert first_facts(tmp_path / "out", None) == {}


def test_nothing_stays_of_a_run_that_did_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Work(tmp_path / "out", "plan", tmp_path / "work"):
        raise ZeroDivisionError
    assert sorted(os.listdir(tmp_path)) == ["work"]
    assert os.listdir(tmp_path / "work") == []


def test_work_folders_of_equal_names_differ(tmp_path: Path) -> None:
    work = tmp_path / "work"
    assert work_of(tmp_path / "a" / "out", work) != work_of(tmp_path / "b" / "out", work)
    assert work_of(tmp_path / "out", None).parent == partial_of(tmp_path / "out")


def test_files_of_others_are_not_taken_over(tmp_path: Path) -> None:
    folder = work_of(tmp_path / "out", tmp_path / "work")
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(LilliputError, match="no run of lilliput wrote them"):
        Work(tmp_path / "out", "plan", tmp_path / "work").__enter__()
    assert (folder / "mine.txt").read_text() == "mine"


def test_space_counts_what_is_there(tmp_path: Path) -> None:
    with Work(tmp_path / "out", "plan") as work:
        free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
        work.need(1000, 1000)
        with pytest.raises(PlanError, match=r"free but .* will be written"):
            work.need(free // 2 + 10**9, free // 2 + 10**9)  # each would fit, both do not
        # A file with a hole says that it is there already.
        with (work.staging / "shard").open("wb") as file:
            file.truncate(2 * free)
        work.need(2 * free, 1000)
        work.note({"kind": "x"})


def test_only_what_is_named_is_kept(tmp_path: Path) -> None:
    with Work(tmp_path / "out", "plan") as work:
        for name in ("hidden-0001.bin", "hidden-0002.bin"):
            (work.folder / name).write_text("x")
        work.keep(["hidden-0002.bin"])
        assert sorted(os.listdir(work.folder)) == ["hidden-0002.bin", "journal.jsonl"]


def test_atomic_files(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "one")
    write_atomically(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "two"
    save_atomically(tmp_path / "b", {"x": torch.ones(2)})
    assert load_file(tmp_path / "b")["x"].tolist() == [1.0, 1.0]
    with pytest.raises(OSError):
        save_atomically(tmp_path / "no" / "b", {"x": torch.ones(2)})
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_and_folders_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with Work(tmp_path / "out", "plan") as work:
            save_atomically(work.folder / "b", {"x": torch.ones(2)})
            write_atomically(work.folder / "a", "one")
            paths = [work.partial, *work.partial.rglob("*")]
            assert {path.name for path in paths} == {".out.partial", "a", "b", "journal.jsonl", "lock", "model", "work"}
            for path in paths:
                assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path
    finally:
        os.umask(before)
