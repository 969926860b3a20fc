"""Wrong text and places are errors of the plan, and of a run before it reads the checkpoint."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lilliput import api
from lilliput.errors import DataError, LilliputError, PlanError
from lilliput.plan.plan import Plan
from lilliput.progress import Quiet
from lilliput.source import Source

Tiny = Callable[[str], Path]
ROOM: dict[str, Any] = {"samples": 4, "tokens": 32, "device": "cpu", "dtype": "float32"}


@pytest.fixture
def short(tmp_path: Path) -> Path:
    path = tmp_path / "short.txt"
    path.write_text("too few words")
    return path


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that must not be scanned."""

    def scan(self: Source, *a: Any, **k: Any) -> None:
        raise AssertionError("the checkpoint was scanned")

    monkeypatch.setattr(Source, "scan", scan)


@pytest.mark.parametrize("recipe", ["gptq", "w8"])  # w8 reads no text
def test_a_plan_names_wrong_text(tiny: Tiny, tmp_path: Path, recipe: str) -> None:
    for data, said in (("dokcs", "not a source of text"), (str(tmp_path / "no.jsonl"), "no file")):
        with pytest.raises(DataError, match=said):
            api.plan(tiny("llama"), recipe=recipe, data=data, **ROOM)


def test_a_plan_counts_tokens(tiny: Tiny, short: Path) -> None:
    with pytest.raises(DataError, match="are needed"):
        api.plan(tiny("llama"), recipe="gptq", data=str(short), **ROOM)
    assert api.plan(tiny("llama"), recipe="gptq", data="self", **ROOM)


def test_a_plan_looks_at_the_place_for_work(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api.plan(tiny("llama"), recipe="gptq", work=tmp_path / "new" / "work", **ROOM)
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    for call in (
        lambda work: api.plan(tiny("llama"), recipe="gptq", work=work, **ROOM),
        lambda work: api.compress(tiny("llama"), tmp_path / "out", recipe="gptq", work=work, progress=Quiet(), **ROOM),
    ):
        with pytest.raises(PlanError, match=r"--work .*is no folder"):
            call(tmp_path / "file" / "work")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("lilliput.run.journal.shutil.disk_usage", lambda place: usage)
    with pytest.raises(PlanError, match="--work"):
        api.plan(tiny("llama"), recipe="gptq", work=tmp_path / "work", **ROOM)


@pytest.mark.parametrize(
    "wrong",
    [{"data": "dokcs"}, {"data": "SHORT"}, {"eval_data": "dokcs"}, {"eval_data": "SHORT"}, {"eval_windows": 100_000}],
    ids=str,
)
def test_a_run_reads_its_text_before_the_checkpoint(
    tiny: Tiny, tmp_path: Path, short: Path, unread: None, wrong: dict[str, Any]
) -> None:
    wrong = {key: str(short) if value == "SHORT" else value for key, value in wrong.items()}
    with pytest.raises(LilliputError, match="text"):
        api.compress(tiny("llama"), tmp_path / "out", recipe="gptq", progress=Quiet(), **ROOM, **wrong)
    assert os.listdir(tmp_path) == ["short.txt"]


def test_a_model_that_would_write_its_text_beyond_the_budget(
    tiny: Tiny, tmp_path: Path, unread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Plan, "parameters", 10**12)
    for call in (api.plan, lambda *a, **k: api.compress(*a, tmp_path / "out", progress=Quiet(), **k)):
        with pytest.raises(PlanError, match="--data self"):
            call(tiny("llama"), recipe="gptq", data="self", memory=10**10, **ROOM)


def test_eight_bits_need_no_tokenizer(tiny: Tiny, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).symlink_to(tiny("llama") / name)
    done = api.compress(model, tmp_path / "out", recipe="w8", eval_windows=0, progress=Quiet(), **ROOM)
    assert {row["tokens"] for row in done.rows} == {0}
    with pytest.raises(LilliputError, match="tokenizer"):
        api.compress(model, tmp_path / "other", recipe="w8", progress=Quiet(), **ROOM)
