"""my-method against a slow version written from its equations."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from lilliput.methods.search.my_method import Options, search
from lilliput.target import Target
from lilliput.verbs.scores import Share

BUDGET = {name: Share(n, (8 + n, 6), Target()) for n, name in enumerate("abc")}


def reference(losses: Mapping[str, float], before: float) -> str | None:
    """replace: your equations, as obvious as can be. Now: the linear that changes."""
    lower = sorted((lost, name) for name, lost in losses.items() if lost < before)
    return lower[0][1] if lower else None


@pytest.mark.parametrize("losses", [{"a": 2.0, "b": 1.0, "c": 1.5}, {"a": 3.0, "b": 4.0, "c": 3.0}])
def test_my_method_agrees_with_the_reference(losses: Mapping[str, float]) -> None:
    asked: list[int] = []

    def loss(changes: Mapping[str, Target], left: int) -> float:
        asked.append(left)
        assert all(target.rank == 3 for target in changes.values())
        return losses[next(iter(changes))] if changes else 2.5

    targets, sentence = search(loss, BUDGET, Options(kept=0.5))
    assert targets.keys() == BUDGET.keys()
    changed = [name for name, target in targets.items() if target.rank is not None]
    expected = reference(losses, 2.5)
    assert changed == ([] if expected is None else [expected])
    assert sentence.startswith("my-method: ")
    assert asked == [3, 2, 1, 0], "how many calls may follow"
