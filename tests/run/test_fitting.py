"""Fits inside the block loop: whole runs on tiny models, resumed runs, and what the plan refuses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lilliput import api
from lilliput.errors import PlanError
from lilliput.methods.fit import signround
from lilliput.model.stored import open_model
from lilliput.progress import Quiet
from lilliput.run import fitting
from lilliput.run.result import Compression
from lilliput.streaming.forward import embed
from lilliput.streaming.states import Activations

pytestmark = pytest.mark.slow

Tiny = Callable[[str], Path]
ROOM: dict[str, Any] = {"samples": 8, "tokens": 32, "device": "cpu", "dtype": "float32"}
FIT = "{method: signround, options: {iters: 8, batch: 4}}"
ALONE = "steps:\n- {method: signround, target: {bits: 3, group_size: 32, symmetric: false}, options: {iters: 8}}\n"
AFTER = f"steps:\n- {{method: gptq, target: {{bits: 3, group_size: 32, symmetric: false}}}}\n- {FIT}\n"


def compress(model: Path, out: Path, recipe: str, **more: Any) -> Compression:
    return api.compress(model, out, recipe=recipe, eval_windows=0, progress=Quiet(), **(ROOM | more))


def weights(folder: Path) -> dict[str, str]:
    return {x.name: hashlib.sha256(x.read_bytes()).hexdigest() for x in sorted(folder.glob("*.safetensors"))}


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = api.load(folder, dtype=torch.float32)(torch.arange(40)[None]).logits
    return out


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_blocks_lose_less_and_the_folder_holds_it(tiny: Tiny, tmp_path: Path, name: str) -> None:
    runs = {x: compress(tiny(name), tmp_path / x, y) for x, y in (("alone", ALONE), ("after", AFTER))}
    first = {x: done.rows[0]["block_loss"] for x, done in runs.items()}
    for done in runs.values():
        assert len(done.rows) == len(done.plan.compressed)
        for row in done.rows:
            assert row["block_loss"][1] < row["block_loss"][0]
            assert row["error"] > 0
        assert api.verify(done.out).problems == ()
    # In the first block both have the same target: what GPTQ gives is a better start, and not the end.
    assert first["after"][1] < min(first["after"][0], first["alone"][1])
    start = compress(tiny(name), tmp_path / "start", ALONE, settings=["signround.iters=0"])
    assert start.rows[0]["block_loss"] == [first["alone"][0]] * 2
    exact = logits(tiny(name))
    lost = {x: float((logits(done.out) - exact).square().mean()) for x, done in (runs | {"start": start}).items()}
    assert max(lost["alone"], lost["after"]) < lost["start"]


def test_what_is_measured_is_what_is_written(tiny: Tiny, tmp_path: Path) -> None:
    """The stated loss of block 0 is that of the block as it is read back from the folder."""
    done = compress(tiny("llama"), tmp_path / "out", AFTER, settings=["signround.weigh=alike"])
    ids = api.load_tokens("docs", open_model(str(tiny("llama"))).source.tokenizer(), samples=8, tokens=32).ids
    seen = []
    with torch.no_grad():
        for folder in (tiny("llama"), done.out):
            model = open_model(str(folder))
            with Activations(tmp_path / "h", (8, 32, 64), torch.float32, create=True) as store:
                batches = embed(model, ids, 8, store)
                model.load_block(0)
                seen.append(model.skeleton.run(0, store.read(0, 8), batches.calls[8]))
    assert done.rows[0]["block_loss"][1] == pytest.approx(float((seen[0] - seen[1]).square().mean()), rel=1e-4)


def test_half_precision_gains_as_well(tiny: Tiny, tmp_path: Path) -> None:
    done = compress(tiny("llama"), tmp_path / "out", AFTER, dtype="bfloat16")
    assert done.plan.dtype is torch.bfloat16
    assert all(row["block_loss"][1] < 0.95 * row["block_loss"][0] for row in done.rows)


def test_an_expert_without_tokens_keeps_its_start(tiny: Tiny, tmp_path: Path) -> None:
    """Two tokens go to at most four of eight experts' places: GPTQ's codes stay where nobody came by."""
    few = {"samples": 1, "tokens": 2}
    fit = AFTER.replace("batch: 4", "batch: 1")
    for name, recipe in (("start", fit.replace("iters: 8", "iters: 0")), ("end", fit)):
        compress(tiny("mixtral"), tmp_path / name, recipe, **few)
    before, after = (open_model(str(tmp_path / name)) for name in ("start", "end"))
    experts = [n for n in before.skeleton.names_of(0) if ".experts." in n and n.endswith("down_proj.weight")]
    same = [torch.equal(before.read(n), after.read(n)) for n in experts]
    assert len(same) == 4
    assert any(same)
    assert not all(same)


def test_a_rewrite_and_a_mask_come_first(tiny: Tiny, tmp_path: Path) -> None:
    recipe = f"""
steps:
- {{method: awq, options: {{grid: 2, search: minmax}}}}
- {{method: wanda, target: {{pattern: '2:4'}}}}
- {{method: gptq, target: {{bits: 4, group_size: 32}}, options: {{search: minmax}}}}
- {FIT}
"""
    done = compress(tiny("llama"), tmp_path / "out", recipe, settings=["signround.include=mlp.*"])
    fitted = [row for row in done.rows if "block_loss" in row]
    assert {row["name"].split(".")[-2] for row in fitted} == {"mlp"}
    assert len(fitted) == 12
    assert all(row["block_loss"][1] < row["block_loss"][0] for row in fitted)
    for row in done.rows:
        assert row["zeros"] >= 0.5
        assert row["methods"] == ["wanda", "gptq", *(["signround"] if row in fitted else [])]


def test_an_interrupted_run_ends_with_the_same_bytes(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compress(tiny("llama"), tmp_path / "whole", AFTER)
    calls: list[int] = []
    fit = signround.fit

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(*args)

    monkeypatch.setitem(vars(signround.METHOD), "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(tiny("llama"), tmp_path / "out", AFTER)
    again = compress(tiny("llama"), tmp_path / "out", AFTER)
    assert again.skipped == 2
    assert weights(again.out) == weights(whole.out)
    assert {row["name"]: row.get("block_loss") for row in again.rows} == {
        row["name"]: row.get("block_loss") for row in whole.rows
    }
    assert sorted(x.name for x in tmp_path.iterdir()) == ["out", "whole"]


def test_the_targets_leave_with_the_block(tiny: Tiny, tmp_path: Path) -> None:
    model = open_model(str(tiny("llama")))
    anatomy = model.anatomy().blocks[0]
    with torch.no_grad(), Activations(tmp_path / "h", (4, 16, 64), torch.float32, create=True) as store:
        batches = embed(model, torch.arange(64).view(4, 16), 2, store)
        model.load_block(0)
        with fitting.observe(model, 0, anatomy, batches, store, frozenset({"square"})) as seen:
            assert (tmp_path / fitting.TARGETS).is_file()
            for a, b in batches.bounds:
                plain = model.skeleton.run(0, store.read(a, b), batches.calls[b - a])
                assert torch.equal(seen.targets.read(a, b), plain)
            # Any number of samples runs, not only those that calibration is cut into.
            torch.testing.assert_close(seen.run({}, store.read(0, 3)), seen.targets.read(0, 3), rtol=1e-5, atol=1e-5)
            assert all(seen.stats[site.name].count == 64 for site in anatomy.sites)
        assert not (tmp_path / fitting.TARGETS).exists()


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("- {method: gptq}\n- {method: signround, target: {bits: 3}}", "another target"),
        ("- {method: signround}\n- {method: gptq}", "make it the last one"),
        ("- {method: signround}\n- {method: flexround}", "only one of its family"),
        ("- {method: signround}\n- {method: awq}", "move it to the front"),
        ("- {method: signround, target: {format: nowhere}}", "no format 'nowhere'"),
    ],
)
def test_what_cannot_follow_is_refused(tiny: Tiny, steps: str, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        api.plan(tiny("llama"), recipe=f"steps:\n{steps}\n", **ROOM)


def test_the_plan_counts_memory_and_time(tiny: Tiny) -> None:
    shape = {**ROOM, "samples": 8, "tokens": 128}
    plain = api.plan(tiny("wide"), recipe=AFTER.replace(f"- {FIT}\n", ""), **shape)
    fits = api.plan(tiny("wide"), recipe=AFTER, **shape)
    long = api.plan(tiny("wide"), recipe=AFTER.replace("iters: 8", "iters: 800"), **shape)
    assert fits.batching.where == "fitting a block"
    assert fits.batching.bytes > plain.batching.bytes
    assert fits.bytes == plain.bytes
    assert long.seconds > 1.5 * fits.seconds
    tight = api.plan(tiny("wide"), recipe=AFTER, memory=fits.batching.bytes - 1, **shape)
    assert tight.batching.batch < fits.batching.batch
