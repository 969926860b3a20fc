"""Several models side by side: which are best, which cannot be compared."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from lilliput.errors import DataError
from lilliput.report.compare import comparison_rows, headline, render_comparison
from lilliput.report.figures import label_offsets


def near(value: float) -> dict[str, float]:
    return {"value": value, "low": value * 0.999, "high": value * 1.001}


def model(sample: dict[str, Any], name: str, size: int, kl: float, speed: float, ratio: float = 1.05) -> dict[str, Any]:
    found = copy.deepcopy(sample)
    found["model"] = f"out/{name}"
    found["size"] |= {"bytes": size, "compression_ratio": 7_080_000 / size}
    for row in found["quality"]["data"]:
        row |= {"kl": near(kl), "perplexity_ratio": near(ratio)}
    found["speed"]["decode"]["speedup"] = near(speed)
    found["tasks"] = found["verdict"] = None
    return found


@pytest.fixture
def models(sample: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        model(sample, "w8", 4_300_000, 0.002, 1.2, 1.001),
        model(sample, "w4", 3_060_000, 0.06, 1.3),
        model(sample, "w4-rtn", 3_060_000, 0.12, 1.3, 1.1),
        model(sample, "w3", 2_600_000, 0.24, 1.25, 1.2),
        model(sample, "2of4", 4_600_000, 0.7, 1.0, 2.0),
    ]


def test_the_best_are_those_that_none_beats_in_both(models: list[dict[str, Any]]) -> None:
    rows = comparison_rows(models)
    assert [row["name"] for row in rows] == ["w8", "w4", "w4-rtn", "w3", "2of4"]
    assert [row["name"] for row in rows if row["best_size"]] == ["w8", "w4", "w3"]
    assert [row["name"] for row in rows if row["best_speed"]] == ["w8", "w4"]
    assert [row["level"] for row in rows] == ["ok", "loss", "loss", "loss", "bad"]
    assert headline(rows).startswith("w8 is the smallest without a loss worth mentioning: 4.3 MB")
    assert headline(rows[1:]) == "All have a loss. By size and loss, none of the others beats w4 and w3."


def test_equals_are_both_best(sample: dict[str, Any]) -> None:
    twins = [model(sample, name, 10, 0.1, 1.0) for name in ("a", "b")]
    assert [row["best_size"] for row in comparison_rows(twins)] == [True, True]


def test_speeds_whose_intervals_overlap_are_equal(sample: dict[str, Any]) -> None:
    """Else noise would make the model with the greater loss one of the best."""
    good, bad = (model(sample, name, 10, kl, 1.0) for name, kl in (("good", 0.1), ("bad", 0.2)))
    good["speed"]["decode"]["speedup"] = {"value": 0.98, "low": 0.93, "high": 1.04}
    bad["speed"]["decode"]["speedup"] = {"value": 1.0, "low": 0.94, "high": 1.06}
    assert [row["best_speed"] for row in comparison_rows([good, bad])] == [True, False]
    bad["speed"]["decode"]["speedup"] = {"value": 1.1, "low": 1.05, "high": 1.15}
    assert [row["best_speed"] for row in comparison_rows([good, bad])] == [True, True]


def test_a_model_without_a_figure_is_neither_best_nor_in_the_way(models: list[dict[str, Any]]) -> None:
    models[3]["size"] = models[3]["speed"] = None
    rows = comparison_rows(models)
    assert (rows[3]["bytes"], rows[3]["best_size"], rows[3]["best_speed"]) == (None, False, False)
    assert [row["name"] for row in rows if row["best_size"]] == ["w8", "w4"]


def test_without_divergences_the_ratio_counts(models: list[dict[str, Any]]) -> None:
    for row in models[1]["quality"]["data"]:
        row["kl"] = None
    rows = comparison_rows(models)
    assert {row["loss"] for row in rows} == {"perplexity_ratio"}


def test_only_text_that_all_have_seen_is_compared(models: list[dict[str, Any]]) -> None:
    models[1]["quality"]["data"].pop(0)
    assert {row["data"] for row in comparison_rows(models)} == {"web"}
    for row in models[1]["quality"]["data"]:
        row["fingerprint"] = f"other {row['name']}"
    with pytest.raises(DataError, match=r"no text in common .*encyclopedia.*; out/w4 on web, code; .* same --data"):
        comparison_rows(models)


def test_what_cannot_be_compared_is_refused(models: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match="1 model cannot be compared"):
        comparison_rows(models[:1])
    models[2]["against"] = "models/another"
    with pytest.raises(DataError, match=r"different originals \(models/sample-lm, models/another\)"):
        comparison_rows(models)


def test_names_are_as_long_as_it_takes_to_tell_them_apart(models: list[dict[str, Any]]) -> None:
    models[0]["model"], models[1]["model"] = "a/w4", "b/w4/"
    assert [row["name"] for row in comparison_rows(models[:2])] == ["a/w4", "b/w4"]
    models[0]["model"] = models[1]["model"]
    assert [row["name"] for row in comparison_rows(models[:2])] == ["b/w4 (1)", "b/w4 (2)"]


def test_the_page_has_table_and_both_plots(models: list[dict[str, Any]]) -> None:
    text = render_comparison(models)
    assert text == render_comparison(models)
    assert text.count('class="drawn"') == 2
    assert "http" not in text.replace("http-equiv", "")
    for row in models:
        assert text.count(row["model"].removeprefix("out/")) >= 5


def test_without_speeds_one_plot_is_left(models: list[dict[str, Any]]) -> None:
    for row in models:
        row["speed"] = None
        row["quality"]["data"][0]["kl"] = None
    text = render_comparison(models)
    assert text.count('class="drawn"') == 1
    assert "perplexity ratio" in text


def test_names_beside_near_points_cover_nothing() -> None:
    spots = [(100.0, 50.0), (112.0, 50.5), (300.0, 50.0), (112.0, 30.0)]
    widths = [40.0] * 4
    places = label_offsets(spots, widths, [1, 0, 2, 3], 200.0)
    boxes = [(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    for n, (dx, dy) in places.items():
        x, y = spots[n][0] + dx, spots[n][1] + dy
        box = (x, y, x + 40, y + 11) if dx > 0 else (x - 40, y, x, y + 11)
        assert not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in boxes)
        boxes.append(box)
    assert places[2] == (-9, 7), "a lone point on the right has its name on the left"
