"""Orders of removal with their errors, and widths that differ by block against every combination."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.methods.edit import ziplm
from lilliput.run import timing
from lilliput.verbs.edits import EditIO, Sizes, Units
from lilliput.verbs.timing import Timing


def slowly(weight: Tensor, gram: Tensor, size: int, damping: float) -> list[float]:
    """Scores of all units: whatever leaves next is tried, with the weights that stay changed for each trial."""
    matrix = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    scores = [0.0] * (len(gram) // size)
    gone: list[int] = []
    while len(gone) < len(gram):
        errors = {}
        for n in range(len(scores)):
            if n * size in gone:
                continue
            out = gone + list(range(n * size, n * size + size))
            kept = [j for j in range(len(gram)) if j not in out]
            fitted = torch.linalg.solve(matrix[kept][:, kept], matrix[kept] @ weight.T).T if kept else weight[:, :0]
            miss = weight.clone()
            miss[:, kept] -= fitted
            errors[n] = float((miss @ matrix * miss).sum())
        best = min(errors, key=lambda n: errors[n])
        scores[best] = errors[best] / float((weight @ matrix * weight).sum())
        gone += range(best * size, best * size + size)
    return scores


def test_scores_are_errors_of_greedy_removal(scored: Any) -> None:
    options = ziplm.Options(kinds=("channel", "head"))
    got = ziplm.score(scored.view, EditIO(scored.stats("gram"), {}, {}), options)
    for key, name, size in (("heads", "self_attn.o_proj", 12), ("channels.0", "mlp.down_proj", 1)):
        expected = slowly(scored.weights[name], scored.gram(name), size, 0.01)
        assert got[key] == pytest.approx(expected, rel=1e-3)
    assert set(ziplm.score(scored.view, EditIO(scored.stats("gram"), {}, {}), ziplm.Options())) == {"channels.0"}


def test_of_two_channels_that_do_the_same_one_leaves_for_nothing(scored: Any) -> None:
    x = scored.x["mlp.down_proj"]
    x[:, 11] = 3.0 * x[:, 5]
    got = ziplm.score(scored.view, EditIO(scored.stats("gram"), {}, {}), ziplm.Options(damping=1e-6))["channels.0"]
    first, second = sorted((got[5], got[11]))
    assert first == min(got)
    assert first < 1e-4 < second
    kept = ziplm.run([{"channels.0": got}], [Units((40,), 2, 72, 1, 1)], Sizes(1, 39), ziplm.Options()).channels[0, 0]
    assert len({5, 11} & set(kept)) == 1


@pytest.mark.parametrize("limit", [9, 11, 17, 30])
def test_widths_are_those_that_every_combination_would_show(limit: int) -> None:
    draw = torch.Generator().manual_seed(limit)
    errors = [ziplm.by_width(torch.rand(4, generator=draw).tolist()) for _ in range(4)]
    times = [{width: 1 + width + int(torch.randint(3, (1,), generator=draw)) for width in x} for x in errors]
    found, error = ziplm.widths(errors, times, limit)
    every = [
        sum(errors[n][w] for n, w in enumerate(picked))
        for picked in product(range(5), repeat=4)
        if sum(times[n][w] for n, w in enumerate(picked)) <= limit
    ]
    assert sum(times[n][w] for n, w in enumerate(found)) <= limit
    assert error == pytest.approx(min(every), rel=1e-12)
    assert sum(errors[n][w] for n, w in enumerate(found)) == pytest.approx(error)


def test_a_limit_that_no_widths_keep_is_refused() -> None:
    with pytest.raises(PlanError, match="the quickest take 6: allow more time"):
        ziplm.widths([{0: 1.0, 1: 0.0}] * 2, [{0: 3, 1: 5}] * 2, 5)


def test_errors_by_width_grow_as_units_leave() -> None:
    assert ziplm.by_width([0.4, 0.1, 0.9]) == {3: 0.0, 2: 0.1, 1: 0.4, 0: 0.9}


def test_blocks_of_their_own_widths_lose_least_at_as_many_weights() -> None:
    draw = torch.Generator().manual_seed(0)
    units = [Units((8,), 3, 5, 12, 100)] * 3
    sizes = Sizes(3, 4, 2, spread=True, multiple=2)

    def grown(count: int, scale: float) -> tuple[float, ...]:
        left = (torch.rand(count, generator=draw) * scale).cumsum(0)
        return tuple(left[torch.randperm(count, generator=draw)].tolist())

    scores = [{"heads": grown(3, 1.0), "channels.0": grown(8, 0.1 + n)} for n in range(3)]

    def error(values: Any, kept: int) -> float:
        return ([0.0, *sorted(values)])[len(values) - kept]

    every = []
    for picked in product(product((1, 2, 3), (2, 4, 6, 8)), repeat=3):
        if sum(12 * h + 5 * c for h, c in picked) <= 3 * (2 * 12 + 4 * 5):
            lost = [error(s["heads"], h) + error(s["channels.0"], c) for s, (h, c) in zip(scores, picked, strict=True)]
            every.append(sum(lost))
    found = ziplm.run(scores, units, sizes, ziplm.Options())
    lost = sum(error(scores[n]["heads"], len(x)) for n, x in found.heads.items())
    lost += sum(error(scores[n]["channels.0"], len(x)) for (n, _), x in found.channels.items())
    assert lost == pytest.approx(min(every), rel=1e-12)
    assert len({len(x) for x in found.channels.values()}) > 1
    assert all(len(x) % 2 == 0 for x in found.channels.values())
    kept = sum(12 * len(x) for x in found.heads.values()) + sum(5 * len(x) for x in found.channels.values())
    assert kept <= 3 * (2 * 12 + 4 * 5)
    for n, stays in found.heads.items():
        gone = set(range(3)) - set(stays)
        assert all(scores[n]["heads"][a] < scores[n]["heads"][b] for a in gone for b in stays)


def timed_scores(draw: torch.Generator) -> tuple[list[dict[str, tuple[float, ...]]], list[dict[str, dict[int, int]]]]:
    scores, times = [], []
    for n in range(3):
        values = {
            "heads": torch.rand(3, generator=draw).cumsum(0),
            "channels.0": (1 + n) * torch.rand(8, generator=draw),
        }
        scores.append({key: tuple(x.tolist()) for key, x in values.items()})
        # A machine on which time falls in stairs.
        channels = {
            w: 400_000 + 300_000 * -(-w // 4) + int(torch.randint(9000, (1,), generator=draw)) for w in (2, 4, 6, 8)
        }
        times.append({"heads": {h: 250_000 * h for h in (1, 2, 3)}, "channels.0": channels, "rest": {0: 50_000}})
    return scores, times


def test_a_speedup_is_met_at_the_least_sum_of_errors_of_every_combination() -> None:
    scores, times = timed_scores(torch.Generator().manual_seed(1))
    units, sizes = [Units((8,), 3, 5, 12, 100)] * 3, Sizes(3, 4, 2, spread=True, multiple=2, times=times)
    whole = sum(max(x.items())[1] for block in times for x in block.values())

    def taken(picked: Any) -> int:
        return sum(b["heads"][h] + b["channels.0"][c] + b["rest"][0] for b, (h, c) in zip(times, picked, strict=True))

    def lost(picked: Any) -> float:
        pairs = zip(scores, picked, strict=True)
        return sum(ziplm.by_width(s["heads"])[h] + ziplm.by_width(s["channels.0"])[c] for s, (h, c) in pairs)

    every = [x for x in product(product((1, 2, 3), (2, 4, 6, 8)), repeat=3) if taken(x) <= whole / 1.4]
    options = ziplm.Options(speedup=1.4, uniform=False, kinds=("channel", "head"))
    found = ziplm.run(scores, units, sizes, options)
    mine = [(len(found.heads[n]), len(found.channels[n, 0])) for n in range(3)]
    assert taken(mine) <= whole / 1.4
    assert lost(mine) == pytest.approx(min(lost(x) for x in every), rel=1e-12)
    # Attention keeps its time where only channels may leave.
    only = [{key: x for key, x in block.items() if key != "heads"} for block in scores]
    found = ziplm.run(
        only, units, Sizes(3, 4, spread=True, multiple=2, times=times), ziplm.Options(speedup=1.1, uniform=False)
    )
    assert taken([(3, len(found.channels[n, 0])) for n in range(3)]) <= whole / 1.1
    with pytest.raises(PlanError, match="the narrowest blocks take"):
        ziplm.run(
            only, units, Sizes(3, 4, spread=True, multiple=2, times=times), ziplm.Options(speedup=1.5, uniform=False)
        )
    with pytest.raises(PlanError, match=r"more than 1 / 5\.0 of the time"):
        ziplm.run(
            only, units, Sizes(3, 4, spread=True, multiple=2, times=times), ziplm.Options(speedup=5.0, uniform=False)
        )


def test_a_speedup_needs_widths_of_its_own_for_each_block() -> None:
    with pytest.raises(PlanError, match="set uniform to false"):
        ziplm.sizes([Units((40,), 2, 72, 100, 6000)], ziplm.Options(speedup=1.5))
    with pytest.raises(PlanError, match="taken for a ratio until it is timed"):
        ziplm.sizes([Units((40,), 2, 72, 100, 6000)], ziplm.Options(speedup=3.0, uniform=False))


def test_the_table_has_every_head_and_even_widths_and_follows_the_roofline(toy: Any) -> None:
    from lilliput.efficiency.devices import device

    times = timing.table(toy.model, Timing("phone", 1, 8, 4))
    block, named = toy.model.anatomy().blocks[0], device("phone")
    assert list(times[0]["channels.0"]) == [8, 16, 32, 40]  # 10, 20 and 30 as multiples of 8
    assert list(times[0]["heads"]) == [1, 2]
    assert times[0]["rest"] == {0: 0}
    hidden, item = block.linear("mlp.gate_proj").in_features, 2
    for width, time in times[0]["channels.0"].items():
        moved = 3 * item * (width * hidden + width + hidden)
        flops = 3 * 2 * width * hidden
        expected = max(moved / named.bandwidth, flops / named.peaks[named.arithmetic("bf16")])
        assert time == max(1, round(1e9 * expected))


def test_measured_times_are_medians_of_a_clock_and_an_unknown_device_is_named(toy: Any) -> None:
    clock = iter(float(x * x) for x in range(10_000))
    steps = [2 * n + 1 for n in range(0, 2 * timing.REPEATS + 2, 2)][1:]
    assert timing.measured([(4, 3)], 2, torch.float32, "cpu", clock.__next__) == sorted(steps)[len(steps) // 2]
    with pytest.raises(PlanError, match="on the device 'h1000': one of"):
        timing.table(toy.model, Timing("h1000", 1, 8, 4))
