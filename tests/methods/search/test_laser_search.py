"""The search against a slow one on the whole model, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

from lilliput.errors import LilliputError, PlanError
from lilliput.methods.search.laser_search import Options, search
from lilliput.model.stored import open_model
from lilliput.plan.plan import Plan, make
from lilliput.progress import Quiet
from lilliput.recipe.schema import Recipe, Step
from lilliput.run import stages
from lilliput.run.journal import Work
from lilliput.run.stream import run
from lilliput.target import Target
from lilliput.verbs.scores import Share

KEPT = (0.05, 0.3, 0.7)
IDS = torch.randint(0, 48, (5, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(noisy: Callable[[int], Path]) -> Path:
    """A model with noise on top of it: lower ranks of some matrices lower its loss."""
    return noisy(3)


def recipe(**options: Any) -> Recipe:
    return Recipe(steps=(Step(method="laser-search", options=options), Step(method="laser")))


def planned(folder: Path, **options: Any) -> tuple[Plan, Any]:
    model = open_model(str(folder))
    made = make(model, recipe(**options), samples=5, tokens=24, budget=None, size=None, seed=None, dtype=torch.float32)
    return made, model


def lowered(weight: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vt[:rank]).float()


def slow(folder: Path, ids: Tensor, blocks: set[int]) -> tuple[dict[str, int], float, float]:
    """The ranks that the search has to find, and the loss before and after, by transformers and whole SVDs."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    original = {k: v.clone() for k, v in model.state_dict().items()}

    def loss(changes: Mapping[str, int]) -> float:
        state = {k: v.clone() for k, v in original.items()}
        for name, rank in changes.items():
            state[f"{name}.weight"] = lowered(original[f"{name}.weight"], rank)
        model.load_state_dict(state)
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)

    names = [n for n, x in model.named_modules() if isinstance(x, torch.nn.Linear) and n != "lm_head"]
    names = [n for n in names if int(n.split(".")[2]) in blocks]
    before = loss({})
    best = []
    for name in names:
        most = min(original[f"{name}.weight"].shape)
        lost, rank = min((loss({name: max(1, int(k * most))}), max(1, int(k * most))) for k in KEPT)
        if lost < before:
            best.append((lost, name, rank))
    chosen: dict[str, int] = {}
    least = before
    for _, name, rank in sorted(best):
        now = loss({**chosen, name: rank})
        if now < least:
            chosen, least = {**chosen, name: rank}, now
    return chosen, before, least


@pytest.mark.parametrize(("late", "share", "blocks", "count"), [(1.0, 1.0, {0, 1, 2}, 5), (0.6, 0.5, {1, 2}, 3)])
def test_the_ranks_are_those_of_a_slow_search(
    folder: Path, tmp_path: Path, late: float, share: float, blocks: set[int], count: int
) -> None:
    made, model = planned(folder, kept=list(KEPT), late=late, share=share)
    with Work(tmp_path / "out", "key") as work:
        run(made, model, IDS, work, Quiet())
        (found,) = work.find("found")
        losses = [r["loss"] for r in work.find("trial")]
    chosen, before, after = slow(folder, IDS[:count], blocks)
    assert len(chosen) > 2, "a search that finds nothing shows nothing"
    ranks = {name: target["rank"] for name, target in found["targets"].items() if "rank" in target}
    assert ranks == chosen
    assert all(target == {"ratio": 1.0} for name, target in found["targets"].items() if name not in ranks)
    assert losses[0] == pytest.approx(before, rel=1e-5)
    assert after < before
    assert f"loss on the samples {before:.4f} to {after:.4f}" in found["said"]


def test_what_is_written_is_what_was_found(folder: Path, tmp_path: Path) -> None:
    made, model = planned(folder, kept=[0.3], late=1.0, share=0.4)
    before = load_file(folder / "model.safetensors")
    with Work(tmp_path / "out", "key") as work:
        run(made, model, IDS, work, Quiet())
        (found,) = work.find("found")
        after = stages.decided(made, model, work)
        written: dict[str, Tensor] = {}
        for path in work.staging.glob("*.safetensors"):
            written |= load_file(path)
        assert not [*work.folder.glob("trial-*"), *work.folder.glob("backward-*")]
    assert after.notes[-1] == found["said"]
    assert after.bytes == made.bytes
    lower = 0
    for name, target in found["targets"].items():
        old, new = before[f"{name}.weight"], written[f"{name}.weight"]
        if "rank" not in target:
            assert torch.equal(old, new)
        else:
            lower += 1
            torch.testing.assert_close(new, lowered(old, target["rank"]), rtol=1e-4, atol=1e-5)
    assert lower > 0


def test_one_that_helps_alone_and_not_beside_the_best_stays_out() -> None:
    worth = {"a": 0.5, "b": 0.3, "c": 0.2, "d": -0.1}
    budget = {name: Share(n, (10, 20), Target()) for n, name in enumerate(worth)}
    asked: list[int] = []

    def loss(changes: Mapping[str, Target], left: int) -> float:
        asked.append(left)
        clash = 0.4 if {"a", "b"} <= changes.keys() else 0.0
        return 2.0 + clash - sum(worth[n] * float(t.rank == 1) for n, t in changes.items())

    targets, said = search(loss, budget, Options(kept=(0.1, 0.5, 1.0), late=1.0))
    assert {n: t.rank for n, t in targets.items()} == {"a": 1, "b": None, "c": 1, "d": None}
    assert (
        said == "laser-search: 2 of 4 linears lowered, loss on the samples 2.0000 to 1.3000: a to rank 1, c to rank 1."
    )
    assert asked[0] == 8 + 3, "the whole rank is not tried"
    assert asked[:9] == list(range(11, 2, -1))
    assert asked[-1] == 0
    assert len(asked) == 9 + 2, "the best one's loss is known"


def test_nothing_that_helps_changes_nothing() -> None:
    budget = {"a": Share(0, (10, 20), Target()), "b": Share(1, (4, 4), Target())}
    targets, said = search(lambda changes, left: 1.0 + len(changes), budget, Options())
    assert all(t.rank is None and t.ratio == 1.0 for t in targets.values())
    assert said == "laser-search: none of 1 linears lowers the loss (1.0000); all are left unchanged."
    with pytest.raises(LilliputError, match="not finite"):
        search(lambda changes, left: float("nan"), budget, Options())


def test_losses_that_are_no_numbers_are_not_chosen() -> None:
    budget = {"a": Share(0, (10, 20), Target())}

    def loss(changes: Mapping[str, Target], left: int) -> float:
        ranks = [target.rank for target in changes.values()]
        return {1: float("nan"), 5: 0.5}.get(ranks[0] or 0, 0.9) if ranks else 1.0

    targets, _ = search(loss, budget, Options(kept=(0.1, 0.3, 0.5)))
    assert targets["a"].rank == 5, "the lowest rank is tried first"
    targets, _ = search(lambda changes, left: float("nan") if changes else 1.0, budget, Options())
    assert targets["a"].rank is None


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"method": "laser-search"}], "only divides a budget"),
        ([{"method": "laser-search"}, {"method": "rtn", "target": {"bits": 4}}], "tries out laser, not 'rtn'"),
        (
            [{"method": "laser-search"}, {"method": "laser", "options": {"factored": True}}],
            r"known too late for the size.*\(factored=false\)",
        ),
        ([{"method": "laser-search"}, {"method": "laser", "target": {"rank": 3}}], "names its rank already"),
        (
            [{"method": "laser-search", "options": {"kept": [0.5, 1.5]}}, {"method": "laser"}],
            r"a share of 1\.5 of the ranks",
        ),
        ([{"method": "laser"}, {"method": "laser-search"}], "must come before"),
        ([{"method": "awq"}, {"method": "laser-search"}, {"method": "laser"}], r"step 1 \(awq\) changes them too"),
        ([{"method": "laser-search"}] * 2 + [{"method": "laser"}], r"step 2 \(laser-search\) changes them too"),
        ([{"method": "laser", "target": {"ratio": 0.5}}], "'laser' has no target.ratio 0.5"),
    ],
)
def test_what_cannot_be_searched_is_refused(folder: Path, steps: list[dict[str, Any]], message: str) -> None:
    chosen = Recipe(steps=tuple(Step.model_validate(x) for x in steps))
    with pytest.raises(PlanError, match=message):
        make(
            open_model(str(folder)), chosen, samples=5, tokens=8, budget=None, size=None, seed=None, dtype=torch.float32
        )


def test_what_is_spilled_is_known_before(folder: Path, tmp_path: Path, spilled: list[int]) -> None:
    made, model = planned(folder, kept=[0.3], late=1.0, share=0.4)
    with Work(tmp_path / "out", "key") as work:
        run(made, model, IDS, work, Quiet())
    weights = sum(x.linear.parameters * 4 for x in made.resolved.linears)
    assert stages.cost(made, model).disk == sum(spilled) + weights
