"""Training steps from end to end: the driver that a budget of memory allows, and the same folder by either."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lilliput import api
from lilliput.errors import LilliputError, PlanError
from lilliput.model.stored import open_model
from lilliput.progress import Quiet
from lilliput.run import training

Tiny = Callable[[str], Path]
COMMON = {"samples": 4, "tokens": 24, "device": "cpu", "dtype": "float32"}


def recipe(method: str = "lsq", before: dict[str, Any] | None = None, **options: Any) -> str:
    first = {"method": "rtn", "target": {"bits": 3, "group_size": 32}} if before is None else before
    asked = {"steps": 4, "batch": 2, "lr": 0.003, "save": 2, **options}
    return json.dumps({"steps": [first, {"method": method, "options": asked}]}, indent=1)


def run(model: Path, out: Path, text: str, **more: Any) -> Any:
    return api.compress(model, out, recipe=text, eval_windows=0, progress=Quiet(), **{**COMMON, **more})


def losses(out: Path) -> list[float]:
    found: list[float] = json.loads((out / "lilliput.json").read_text())["training"][0]["losses"]
    return found


@pytest.mark.parametrize(("name", "method"), [("llama", "lsq"), ("gpt2", "full")])
def test_a_streamed_training_writes_what_the_whole_one_writes(
    tiny: Tiny, tmp_path: Path, name: str, method: str
) -> None:
    before = {"method": "wanda", "target": {"sparsity": 0.5}} if method == "full" else None
    for driver in ("whole", "streamed"):
        text = recipe(method, before, driver=driver, others=["*norm.weight", "*ln_f*"])
        assert run(tiny(name), tmp_path / driver, text).plan.driving.drivers == ((1, driver),)
    assert losses(tmp_path / "streamed") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)
    assert api.verify(tmp_path / "streamed").whole
    one, two = open_model(tmp_path / "whole"), open_model(tmp_path / "streamed")
    for tensor in one.skeleton.shapes:
        assert (one.read(tensor).float() - two.read(tensor).float()).abs().max() < 2e-3


def test_auto_streams_where_the_model_does_not_fit(tiny: Tiny) -> None:
    text = recipe()
    free = api.plan(tiny("wide"), recipe=text, **COMMON)
    assert free.driving.drivers == ((1, "whole"),)
    assert free.batching.where == "training"
    tight = api.plan(tiny("wide"), recipe=text, memory=free.batching.bytes - 1, **COMMON)
    assert tight.driving.drivers == ((1, "streamed"),)
    assert tight.batching.bytes < free.batching.bytes
    assert tight.driving.disk > 0
    assert 0 < free.driving.disk < tight.driving.disk
    assert any("block by block" in x for x in tight.notes)
    assert not any("block by block" in x for x in free.notes)
    with pytest.raises(PlanError, match=r"lsq.* is to be shared out .* give more with --memory"):
        api.plan(tiny("wide"), recipe=recipe(shard=True), memory=free.batching.bytes - 1, **COMMON)
    roomy = api.plan(tiny("wide"), recipe=text, memory=2 * free.batching.bytes, **COMMON)
    assert roomy.driving.drivers == ((1, "whole"),)


@pytest.mark.parametrize(
    "options",
    [{"held_out": 0.5}, {"optimizer": "paged"}, {"optimizer": "adamw-8bit", "others": ["*norm*"]}, {"top": None}],
    ids=["best", "paged", "8bit", "all"],
)
def test_files_keep_to_the_plan(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    seen, held = [0], training.save_atomically

    def files() -> int:
        return sum(x.stat().st_size for x in (tmp_path / "work").rglob("*") if x.is_file())

    def save(path: Path, tensors: Any, *more: Any) -> None:
        seen.append(files() + sum(x.numel() * x.element_size() for x in tensors.values()))  # both at once
        held(path, tensors, *more)

    monkeypatch.setattr(training, "save_atomically", save)
    plan = run(tiny("llama"), tmp_path / "out", recipe(steps=6, **options), work=tmp_path / "work").plan
    small = 150_000  # the journal, headers, and what steps in front have left
    assert max(seen) <= plan.driving.disk + small
    assert plan.driving.disk < 2 * max(seen)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"objective": "feature-kd"}, "has the teacher run beside the student"),
        ({"objective": "gkd", "objective_options": {"on_policy": 1.0}}, "has the teacher run beside the student"),
        ({"optimizer": "adamw-8bit"}, "moments lie on disk in float32"),
        ({"others": ["*embed_tokens*"]}, "names model.embed_tokens.weight, which is the head too"),
    ],
)
def test_what_needs_the_whole_model_is_refused_with_the_remedy(
    tiny: Tiny, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(PlanError, match=f"cannot go block by block: .*{reason}.*: "):
        api.plan(tiny("llama"), recipe=recipe(driver="streamed", **options), **COMMON)


def test_documents_in_a_row_are_refused_before_the_teacher_reads(tiny: Tiny, tmp_path: Path) -> None:
    rows = [{"text": f"The number {n} comes after {n - 1}, and before {n + 1}."} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(x) for x in rows))
    text = recipe(driver="streamed", data=str(tmp_path / "rows.jsonl"), documents=True, tokens=48)
    with pytest.raises(LilliputError, match="several documents"):
        run(tiny("llama"), tmp_path / "out", text)


@pytest.mark.slow
def test_two_processes_write_the_folder_of_one(
    tiny: Tiny, together: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe(batch=3))
    line = ["compress", str(tiny("llama")), "--recipe", str(tmp_path / "recipe.yaml"), "--samples", "6"]
    line += ["--tokens", "24", "--device", "cpu", "--dtype", "float32", "--eval-windows", "0"]
    for ranks in (1, 2):
        modules = ["torch.distributed.fsdp", "torch.distributed.tensor"]
        done = together(ranks=ranks, line=[*line, "--out", str(tmp_path / str(ranks))], imports=modules)
        assert set(done["code"]) == {0}, done["stderr"]
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), abs=1e-3)
    assert api.verify(tmp_path / "2").whole


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("lsq", {"optimizer": "adamw-8bit"}, "moments in 8 bits"),
        ("lsq", {"driver": "streamed"}, "one block in memory anyway"),
        ("gmp", {}, "looks at whole weights"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(tiny: Tiny, method: str, options: dict[str, Any], reason: str) -> None:
    before = {"method": "magnitude", "target": {"sparsity": 0.5}} if method == "gmp" else None
    with pytest.raises(PlanError, match=f"cannot be shared out over processes: .*{reason}.*: set `"):
        api.plan(tiny("llama"), recipe=recipe(method, before, shard=True, **options), **COMMON)
