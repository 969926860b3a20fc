"""A choice under a budget, carried out: what is kept to, what is predictions, and that a killed run ends alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lilliput.errors import PlanError
from lilliput.folds.kinds import ScaleFold
from lilliput.model.stored import Model, open_model
from lilliput.plan import choices
from lilliput.plan.plan import Plan, divided, make
from lilliput.progress import Quiet
from lilliput.recipe.schema import Recipe, Step, Where
from lilliput.run import choosing, delivery, passes, rewriting, sizing, stages, stream
from lilliput.run.journal import Work
from lilliput.target import Target
from lilliput.verbs.spec import Task
from lilliput.verbs.view import BlockIO, BlockView

IDS = torch.randint(0, 48, (3, 10), generator=torch.Generator().manual_seed(1))
MENU = ["int2/8/asym", "int3/8/asym", "int4/8/asym", "int8/8/asym"]
EVERYTHING = Where(include=("*", "embed", "lm_head"), exclude=("router",))


def planned(model: Model, where: Where = EVERYTHING, **options: object) -> Plan:
    asked = {"menu": MENU, **options}
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


def feasible(plan: Plan, model: Model) -> None:
    (task,) = choices.steps(plan)
    choices.feasible(plan, model, task, sizing.sizer(plan, task, model))


def chosen(plan: Plan, model: Model, out: Path) -> Plan:
    with Work(out, "key") as work:
        stream.run(plan, model, IDS, work, Quiet())
        assert not list(work.folder.glob("trial-*"))
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
    size = plan.bytes + delivery.other_bytes(plan, source) + 7000
    made = chosen(planned(source, size=size), source, tmp_path / "out")
    assert size - 200 < made.folder_bytes <= size


def test_the_smallest_size_that_a_refusal_names_is_one_that_can_be_made(
    source: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "original", lambda _: 10**9)  # files beside the weights outweigh so small a model
    with pytest.raises(PlanError, match=r"makes is (\d+) bytes") as refused:
        feasible(planned(source, size=1000), source)
    size = int(str(refused.value).partition("makes is ")[2].split()[0])
    plan = planned(source, size=size)
    feasible(plan, source)
    assert chosen(plan, source, tmp_path / "out").folder_bytes <= size


def test_more_bits_are_predicted_to_lose_less(source: Model, tmp_path: Path) -> None:
    plan = planned(source, average=5.0)
    (task,) = choices.steps(plan)
    with Work(tmp_path / "out", "key") as work:
        stream.run(plan, source, IDS, work, Quiet())
        predictions = choosing.predictions(plan, task, work)
    assert all(list(x) == sorted(x, reverse=True) for x in predictions.losses.values())
    curve = choices.frontier(plan, source, task, predictions, 6, lambda made: made)
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 1000}, r"the smallest that this menu makes is \d+ bytes"),
        ({"average": 1.0}, "less than the smallest entries"),
        ({"size": 10**9}, "more than the model itself"),
        ({"size": 10**5, "average": 3.0}, "contradict"),
        ({"average": 3.0, "menu": ["4"]}, "neither a menu nor a grid"),
        ({"average": 3.0, "menu": ["int4/64/left"]}, "no kind of scales"),
        ({"seconds": 1e-12, "device": "h100"}, "is too short"),
        ({"seconds": 1.0, "device": "abacus"}, "unknown device"),
    ],
)
def test_what_cannot_be_is_refused_with_the_nearest(source: Model, options: dict[str, object], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        feasible(planned(source, **options), source)


def test_a_time_of_a_decoding_step_is_kept(source: Model, tmp_path: Path) -> None:
    plan = planned(source, Where(), average=8.0)
    seconds = _step(plan, source, "int4/8/asym")
    plan = planned(source, Where(), seconds=seconds, device="h100")
    made = chosen(plan, source, tmp_path / "out")
    assert made.decoding is not None
    assert _step(plan, source, "int3/8/asym") < made.decoding <= seconds


def _step(plan: Plan, model: Model, entry: str) -> float:
    """The predicted time with one grid everywhere."""
    (task,) = choices.steps(plan)
    j = MENU.index(entry)
    targets = {name: options[j][0] for name, options in choices.candidates(plan, task).options.items()}
    timed = planned(model, Where(), seconds=1.0, device="h100")
    (task,) = choices.steps(timed)
    made = divided(timed, model, timed.resolved.with_targets(task, targets))
    found = sizing.sizer(timed, task, model)(made).decoding
    assert found is not None
    return found


def test_a_measuring_that_was_killed_anywhere_goes_on_to_the_same_end(source: Model, tmp_path: Path) -> None:
    plan = planned(source, average=5.0)
    (task,) = choices.steps(plan)

    class _KilledError(Exception):
        pass

    class _Killed(Work):
        left = 0

        def note(self, record: Mapping[str, Any]) -> None:
            super().note(record)
            if self.left == 0:
                raise _KilledError
            self.left -= 1

    with torch.no_grad():
        with Work(tmp_path / "whole", "key") as work:
            choosing.measure(plan, task, source, IDS, work, Quiet())
            whole = choosing.predictions(plan, task, work)
        records = 3 + 2  # blocks, trials, tables
        for after in range(records):
            out = tmp_path / f"killed-{after}"
            with _Killed(out, "key") as work:
                work.left = after
                with pytest.raises(_KilledError):
                    choosing.measure(plan, task, source, IDS, work, Quiet())
            with Work(out, "key") as work:
                choosing.measure(plan, task, source, IDS, work, Quiet())
                assert choosing.predictions(plan, task, work) == whole
                assert not list(work.folder.glob("trial-*"))
                assert not list(work.folder.glob("score-*"))


def test_folds_before_the_choice_change_weights_and_not_what_they_cost(
    source: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales of 2 along every link: grids take them over, and the function stays as it is."""

    def doubled(task: Task, view: BlockView, io: BlockIO) -> list[ScaleFold]:
        return [ScaleFold(x, torch.full(x.index.shape, 2.0)) for x in view.anatomy.links]

    monkeypatch.setattr(rewriting, "decided", doubled)
    plan = planned(source, Where(), average=5.0)
    recipe = plan.resolved.recipe
    awq = Step(method="awq", target=Target(bits=3))
    folded = make(
        source,
        recipe.model_copy(update={"steps": (awq, *recipe.steps)}),
        samples=3, tokens=10, budget=None, size=None, seed=None, dtype=torch.float32,
    )  # fmt: skip
    errors, losses = [], []
    for name, made in (("plain", plan), ("folded", folded)):
        (task,) = choices.steps(made)
        with torch.no_grad(), Work(tmp_path / name, "key") as work:
            choosing.measure(made, task, source, IDS, work, Quiet())
            errors.append(passes.recorded(task, work))
            losses.append(choosing.predictions(made, task, work).losses)
    produced = [x for x in errors[0] if x.endswith(("v_proj", "up_proj"))]
    for name, before in errors[0].items():
        share = 0.25 if name in produced else 1.0  # their outputs are half of what they were
        assert errors[1][name] == pytest.approx([share * x for x in before], rel=1e-3)
        assert losses[1][name] == pytest.approx(losses[0][name], rel=2e-2, abs=1e-7)
