"""Passes before the main one: a run stopped at any record goes on and ends with the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file
from torch import Tensor

from lilliput.errors import LilliputError
from lilliput.methods.allocate import owl, ranks
from lilliput.methods.learn import spinquant
from lilliput.model.stored import Model, open_model
from lilliput.plan.plan import Plan, make
from lilliput.progress import Quiet
from lilliput.recipe.schema import Recipe, Step, Where
from lilliput.run import search as trials
from lilliput.run import stages, stream
from lilliput.run.editing import prepared
from lilliput.run.journal import Work
from lilliput.streaming.backward import Samples, backward
from lilliput.streaming.walk import last_hidden
from lilliput.target import Target
from lilliput.verbs.learn import Learn

pytestmark = pytest.mark.slow

LAYERS = 3
_ALL = Where(include=("*", "embed"))
RECIPES: Mapping[str, tuple[Step, ...]] = {
    "owl, wanda": (Step(method="owl", options={"multiple": 2.0}), Step(method="wanda", target=Target(sparsity=0.6))),
    "spinquant, owl, wanda, gptq": (
        Step(method="spinquant", options={"steps": 1, "sequences": 2}),
        Step(method="owl", options={"multiple": 2.0}),
        Step(method="wanda", target=Target(sparsity=0.5)),
        Step(method="gptq", target=Target(bits=4, group_size="channel")),
    ),
    "ranks, svd-truncate": (
        Step(method="ranks", options={"weighting": "absmean", "alpha": 0.7, "steps": 6, "measure": "energy"}),
        Step(method="svd-truncate", target=Target(ratio=0.6), options={"weighting": "absmean", "alpha": 0.7}),
    ),
    "ranks by loss, svd-truncate": (
        Step(method="ranks", options={"measure": "loss", "steps": 6, "fisher_samples": 2}),
        Step(method="svd-truncate", target=Target(ratio=0.6), options={"weighting": "gram"}),
    ),
    "laser-search, laser": (
        Step(method="laser-search", options={"kept": [0.05, 0.5], "late": 0.6, "share": 0.5}),
        Step(method="laser"),
    ),
    "menu, gptq": (
        Step(
            method="menu",
            options={"menu": ["int2/8", "int3/8", "int8/8"], "average": 5.0, "trial_samples": 2},
            where=_ALL,
        ),
        Step(method="gptq", target=Target(bits=2, group_size="channel"), where=_ALL),
    ),
    "spinquant of heads, rtn": (
        Step(method="spinquant", options={"steps": 1, "sequences": 2, "r2": True, "kind": "orthogonal"}),
        Step(method="rtn", target=Target(bits=4, group_size="channel")),
    ),
    "hadamard, wanda 2:4, gptq": (
        Step(method="hadamard"),
        Step(method="wanda", target=Target(pattern="2:4")),
        Step(method="gptq", target=Target(bits=4, group_size=8)),
    ),
}
IDS = torch.randint(0, 48, (3, 10), generator=torch.Generator().manual_seed(1))


class KilledError(Exception):
    """Stands for kill -9: nothing of ours gets to run after it."""


@pytest.fixture(scope="module")
def source(noisy: Callable[[int], Path]) -> Model:
    return open_model(str(noisy(0)))


def planned(source: Model, steps: tuple[Step, ...]) -> tuple[Plan, Model]:
    recipe = Recipe(steps=steps)
    model = prepared(source, recipe)
    made = make(model, recipe, samples=3, tokens=10, budget=None, size=None, seed=None, dtype=torch.float32)
    return made, model


def run(made: Plan, model: Model, out: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The journal's records and the hashes of the files."""
    with Work(out, "key") as work:
        stream.run(made, model, IDS, work, Quiet())
        files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in work.staging.glob("*.safetensors")}
        left = [*work.folder.glob("score-*.bin"), *work.folder.glob("backward-*.bin")]
        assert not left, "hidden states do not outlive the run"
        return work.records, files


def stopping(after: int, before: bool) -> Callable[[Work, Mapping[str, Any]], None]:
    """Work.note that dies at its record number `after`: before or after writing it."""
    seen: list[None] = []
    note = Work.note

    def stopped(self: Work, record: Mapping[str, Any]) -> None:
        seen.append(None)
        if len(seen) <= after:
            note(self, record)
            return
        if not before:
            note(self, record)
        raise KilledError

    return stopped


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_stopped_at_any_record_ends_with_the_same_bytes(
    name: str, source: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, model = planned(source, RECIPES[name])
    records, expected = run(made, model, tmp_path / "whole")
    kinds = [r["kind"] for r in records]
    learning, scoring = ("spinquant" in name or "hadamard" in name), ("owl" in name or "ranks" in name)
    assert kinds.count("rotation") == learning
    choosing = "menu" in name
    assert kinds.count("score") == (scoring + choosing) * LAYERS
    assert kinds.count("fisher") == ("loss" in name) * LAYERS
    assert kinds.count("found") == ("laser" in name)
    assert not choosing or (kinds.count("trial"), kinds.count("tables")) == (1, 1)
    assert (kinds.count("trial") > 1 + 2 * 7 * 2) == ("laser" in name), "all of two blocks, and what was put together"
    taken: list[None] = []
    measured = trials._Trials._measured
    monkeypatch.setattr(trials._Trials, "_measured", lambda *a: (taken.append(None), measured(*a))[1])
    assert kinds.count("block") == LAYERS
    scored: list[None] = []
    learned: list[None] = []
    scorer = ranks if "ranks" in name else owl
    score, learn = scorer.score, spinquant.learn
    monkeypatch.setitem(vars(scorer.METHOD), "score", lambda *a: (scored.append(None), score(*a))[1])
    monkeypatch.setitem(vars(spinquant.METHOD), "run", lambda *a: (learned.append(None), learn(*a))[1])
    inner = [n for n in range(1, len(kinds) - 1) if kinds[n - 1 : n + 2] == ["trial"] * 3]
    passed_over = set(inner) - set(inner[3::4])  # of dozens of trials alike, some will do
    for after in (n for n in range(len(records)) if n not in passed_over):
        for before in (True, False):
            out = tmp_path / f"{after}-{before}"
            scored.clear()
            learned.clear()
            taken.clear()
            with monkeypatch.context() as patch:
                patch.setattr(Work, "note", stopping(after, before))
                with pytest.raises(KilledError):
                    run(made, model, out)
            again, files = run(made, model, out)
            assert files == expected
            assert [r["kind"] for r in again] == kinds
            # At most the one block, or the one rotation, that had no record yet is done twice.
            assert len(scored) <= scoring * LAYERS + 1
            assert choosing or len(taken) == kinds.count("trial") + (before and kinds[after] == "trial")
            assert len(learned) <= ("spinquant" in name) + (before and kinds[after] == "rotation")


def test_the_plan_of_a_finished_run_is_known_from_its_journal(source: Model, tmp_path: Path) -> None:
    """What is written is what the divided plan says, tensor by tensor, and no more than the plan before allowed."""
    made, model = planned(source, RECIPES["ranks, svd-truncate"])
    with Work(tmp_path / "out", "key") as work:
        stream.run(made, model, IDS, work, Quiet())
        after = stages.decided(made, model, work)
        for number, file in enumerate(after.shards):
            tensors = load_file(work.staging / file)
            planned_tensors = {x.name: (x.dtype, x.shape) for x in after.of_shard(number)}
            assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == planned_tensors
    sizes = [sum(x.nbytes for x in p.tensors) for p in (made, after)]
    assert sizes[1] <= sizes[0]
    assert sizes[0] - sizes[1] < 2 * (24 + 40)  # one rank of the largest linear, in half precision
    assert after.shards == made.shards
    schemes = {x.scheme for x in after.resolved.linears}
    assert len(schemes) > len({x.scheme for x in made.resolved.linears})
    assert after.quantization_config != made.quantization_config
    assert any("Calibration chooses the ranks" in note for note in made.notes)
    assert stages.decided(*planned(source, RECIPES["hadamard, wanda 2:4, gptq"]), work) is not None


def test_what_learning_spills_is_known_before(source: Model, tmp_path: Path, spilled: list[int]) -> None:
    made, model = planned(source, RECIPES["spinquant, owl, wanda, gptq"])
    parts = backward(model.skeleton, model.read, Samples(IDS[:2], tmp_path))
    next(parts)
    assert stages.cost(made, model).disk == sum(spilled)
    assert stages.cost(*planned(source, RECIPES["owl, wanda"])).disk == 0


def test_another_rotation_in_the_work_folder_is_noticed(source: Model, tmp_path: Path) -> None:
    made, model = planned(source, RECIPES["hadamard, wanda 2:4, gptq"])
    with Work(tmp_path / "out", "key") as work, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "note", stopping(2, before=False))
        with pytest.raises(KilledError):
            stream.run(made, model, IDS, work, Quiet())
    path = work.folder / "rotation-00.safetensors"
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    with pytest.raises(LilliputError, match="not what the unfinished run wrote"):
        run(made, model, tmp_path / "out")


def test_other_hidden_states_in_the_work_folder_are_noticed(source: Model, tmp_path: Path) -> None:
    made, model = planned(source, RECIPES["owl, wanda"])
    with Work(tmp_path / "out", "key") as work, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "note", stopping(0, before=False))
        with pytest.raises(KilledError):
            stream.run(made, model, IDS, work, Quiet())
    (state,) = work.folder.glob("score-00-0001.bin")
    state.write_bytes(bytes(state.stat().st_size))
    with pytest.raises(LilliputError, match="not what the unfinished run wrote"):
        run(made, model, tmp_path / "out")


def test_zeros_of_two_in_four_stay_through_rotation_and_gptq(source: Model, tmp_path: Path) -> None:
    made, model = planned(source, RECIPES["hadamard, wanda 2:4, gptq"])
    run(made, model, tmp_path / "out")
    checked = 0
    for x in made.resolved.linears:
        stored = load_file(tmp_path / ".out.partial" / "model" / made.shards[0])
        shape = (x.linear.out_features, x.linear.in_features)
        codes = unpack_from_int32(stored[f"{x.name}.weight_packed"], 4, torch.Size(shape))
        assert bool(((codes.reshape(-1, 4) != 0).sum(1) <= 2).all()), x.name
        assert float((codes != 0).float().mean()) > 0.3
        checked += 1
    assert checked == 7 * LAYERS


def test_the_last_hidden_states_are_the_rotated_models(source: Model, tmp_path: Path) -> None:
    """A rotation turns the hidden states and nothing else."""
    made, model = planned(source, RECIPES["hadamard, wanda 2:4, gptq"])
    (task,) = made.resolved.of(Learn)
    (fold,) = task.method.spec.run(model, None, {}, task.options)

    def states(of: Model) -> Tensor:
        store = last_hidden(of, IDS, tmp_path)
        try:
            return store.read(0, 3)
        finally:
            store.delete()

    plain, turned = states(source), states(model.rotated(fold.matrix))  # type: ignore[attr-defined]
    torch.testing.assert_close(turned, plain @ fold.matrix.float(), rtol=1e-3, atol=1e-4)
