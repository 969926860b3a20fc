"""FineQuant against its definition, and its decision inside the block loop."""

from __future__ import annotations

import pytest
import torch

from lilliput.methods.allocate import finequant
from lilliput.target import Target
from lilliput.verbs.scores import Share


def test_ranges_are_those_of_the_definition() -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    for size in (16, 32, 96):
        ranges = [
            float(weight[i, j : j + size].max() - weight[i, j : j + size].min())
            for i in range(6)
            for j in range(0, 96, size)
        ]
        assert finequant.mean_range(weight, size) == pytest.approx(sum(ranges) / len(ranges))


def _target(weight: torch.Tensor, least: int, fall: float = 0.1) -> Target:
    view = type("View", (), {"weights": {"a": weight}})()
    scores = finequant.score(view, None, finequant.Options())  # type: ignore[arg-type]
    budget = {"a": Share(0, (weight.shape[0], weight.shape[1]), Target(bits=4, group_size=least))}
    return finequant.allocate(scores, budget, finequant.Options(fall=fall))["a"]


def test_groups_are_small_only_where_ranges_fall() -> None:
    rng = torch.Generator().manual_seed(0)
    flat = torch.randint(0, 2, (64, 512), generator=rng).float()  # the same range whatever the group
    assert _target(flat, 32).group_size == -1
    steep = flat * torch.logspace(0, 3, 512)  # each group of 32 has a range of its own
    assert _target(steep, 32).group_size == 32
    assert _target(steep, 64).group_size == 64, "never below what the recipe says"
    halves = torch.cat((flat[:, :256], 100 * flat[:, 256:]), 1)
    assert _target(halves, 32).group_size == 256
    assert _target(halves, 32, fall=0.9).group_size == -1


def test_sizes_that_do_not_divide_the_width_are_passed_over() -> None:
    steep = torch.randn(8, 576, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, 4, 576)
    assert _target(steep, 32).group_size == 32
    assert finequant.choose((576.0, 8.0, *(0.0,) * 7), 32, 0.1) is None


@pytest.mark.parametrize(
    "target", [Target(bits=4, group_size="channel"), Target(format="nf4", group_size=64), Target(bits=4, group_size=48)]
)
def test_targets_without_a_choice_are_refused(target: Target) -> None:
    reason = finequant.refuse(target, finequant.Options())
    assert reason is not None
    assert "step that follows" in reason
