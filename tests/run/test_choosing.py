"""A choice under a budget, carried out: what is kept to, what is foreseen, and that a killed run ends alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lilliput.errors import PlanError
from lilliput.model.stored import Model, open_model
from lilliput.plan import choices
from lilliput.plan.plan import Plan, make
from lilliput.progress import Quiet
from lilliput.recipe.schema import Recipe, Step, Where
from lilliput.run import choosing, delivery, stages, stream
from lilliput.run.choosing import corrections
from lilliput.run.journal import Work
from lilliput.target import Target

IDS = torch.randint(0, 48, (3, 10), generator=torch.Generator().manual_seed(1))
MENU = ["int2/8/asym", "int3/8/asym", "int4/8/asym", "int8/8/asym"]
EVERYTHING = Where(include=("*", "embed", "lm_head"), exclude=("router",))


def planned(model: Model, where: Where = EVERYTHING, **options: object) -> Plan:
    asked = {"menu": MENU, "trials": 3, "trial_samples": 2, **options}
    recipe = Recipe(
        steps=(
            Step(method="menu", options=asked, where=where),
            Step(method="gptq", target=Target(bits=2, group_size="channel", symmetric=False), where=where),
        )
    )
    return make(model, recipe, samples=3, tokens=10, budget=None, size=None, seed=None, dtype=torch.float32)


@pytest.fixture(scope="module")
def source(noisy: Callable[[int], Path]) -> Model:
    return open_model(str(noisy(0)))


def chosen(plan: Plan, model: Model, out: Path) -> Plan:
    with Work(out, "key") as work:
        stream.run(plan, model, IDS, work, Quiet())
        assert not list(work.folder.glob("choose-*"))
        return stages.decided(plan, model, work)


def test_an_average_of_bits_is_kept_and_filled(source: Model, tmp_path: Path) -> None:
    plan = planned(source, average=5.0)
    made = chosen(plan, source, tmp_path / "out")
    found = choices.candidates(plan, plan.resolved.tasks[0])
    weights = sum(x.linear.parameters for x in (*plan.resolved.linears, *plan.resolved.tables))
    bits = 8 * choices.payload(made, found) / weights
    assert 4.9 < bits <= 5.0
    targets = {task.target.bits for x in (*made.resolved.linears, *made.resolved.tables) for task in x.tasks}
    assert len(targets) > 1
    assert made.predicted_kl is not None
    assert made.predicted_kl > 0
    assert "menu chose" in made.notes[-1]


def test_a_size_is_kept_with_all_that_lies_beside_the_weights(source: Model, tmp_path: Path) -> None:
    plan = planned(source, average=8.0)
    size = plan.bytes + delivery.other_bytes(plan, source) + 3500
    made = chosen(planned(source, size=size), source, tmp_path / "out")
    assert size - 200 < made.folder_bytes <= size


def test_more_bits_are_foreseen_to_lose_less(source: Model, tmp_path: Path) -> None:
    plan = planned(source, average=5.0)
    (task,) = choices.steps(plan)
    with Work(tmp_path / "out", "key") as work:
        stream.run(plan, source, IDS, work, Quiet())
        scores = choosing.predictions(plan, task, work)
    assert all(list(x) == sorted(x, reverse=True) for x in scores.values())
    curve = choices.frontier(plan, source, task, scores, 6, lambda made: made)
    assert len(curve) == 6
    assert [x.kl for x in curve] == sorted((x.kl for x in curve), reverse=True)
    assert [x.folder_bytes for x in curve] == sorted(x.folder_bytes for x in curve)
    assert sum(curve[0].chosen.values()) == len(plan.resolved.linears) + 1


def test_an_engine_s_fused_linears_share_a_grid(source: Model, tmp_path: Path) -> None:
    made = chosen(planned(source, Where(), average=5.0, fused=True), source, tmp_path / "out")
    for block in range(3):
        got = {x.linear.role: x.tasks[-1].target.bits for x in made.resolved.of_block(block)}
        assert got["q"] == got["k"] == got["v"]
        assert got["gate"] == got["up"]


def test_what_cannot_be_is_refused_with_the_nearest(source: Model) -> None:
    with pytest.raises(PlanError, match=r"the smallest that this menu makes is \d+ bytes"):
        choices.feasible(planned(source, size=1000), source)
    with pytest.raises(PlanError, match="less than the smallest entries"):
        choices.feasible(planned(source, average=1.0), source)
    with pytest.raises(PlanError, match="more than the model itself"):
        choices.feasible(planned(source, size=10**9), source)
    with pytest.raises(PlanError, match="contradict"):
        choices.feasible(planned(source, size=10**5, average=3.0), source)
    with pytest.raises(PlanError, match="neither a menu nor a grid"):
        choices.feasible(planned(source, average=3.0, menu=["4"]), source)


def test_corrections_lie_between_a_role_s_own_ratio_and_that_of_all() -> None:
    assert corrections({}) == {}
    found = corrections({0: ("q", 2.0), 1: ("o", 0.5), 2: ("q", 2.0)})
    mean = math.exp((2 * math.log(2.0) - math.log(2.0)) / 3)
    assert found[""] == pytest.approx(mean)
    assert mean < found["q"] < 2.0
    assert 0.5 < found["o"] < mean
    assert corrections({0: ("q", 1e9)})["q"] == pytest.approx(choosing.LIMIT)


def test_trials_are_spread_over_depth(source: Model) -> None:
    plan = planned(source, average=5.0, trials=6)
    (task,) = choices.steps(plan)
    found = choosing.trials(plan, task, choices.candidates(plan, task))
    assert [x.block for x in found] == [0, 0, 1, 1, 2, 2]
    assert len({x.name.rpartition(".")[2] for x in found}) > 2
    assert replace(found[0]) == found[0]
