import json
import math

import pytest

from lilliput.metrics import paired
from lilliput.tasks.result import Scored, results


def scored(name, ours, base, metric="acc", **more):
    return Scored(name, "choice", metric, 0, "f.jsonl", "abc", {metric: ours, **more.get("ours", {})}, base)


def test_a_row_holds_flips_tests_and_words():
    ours = [1.0] * 50 + [0.0] * 50
    base = [1.0] * 70 + [0.0] * 30
    (row,) = results([scored("t", ours, {"acc": base})])
    assert row.flips is not None
    assert (row.flips.lost, row.flips.won) == (20, 0)
    assert row.p_value == row.p_holm == paired.mcnemar(20, 0)
    assert row.difference == paired.difference(row.flips)
    assert row.ours == paired.proportion(50, 100)
    assert row.detectable == paired.detectable(100, row.flips.discordant)
    assert (row.level, row.verdict[:13]) == ("loss", "loss of 20.0 ")
    data = json.loads(json.dumps(row.to_json()))
    assert data["flips"] == {"right_to_wrong": 20, "wrong_to_right": 0}
    assert data["base"]["value"] == 0.7


def test_p_values_are_corrected_over_tasks():
    base = {"acc": [1.0] * 20}
    rows = results([scored("a", [0.0] * 6 + [1.0] * 14, base), scored("b", [0.0] * 7 + [1.0] * 13, base)])
    assert [x.p_value for x in rows] == [2 / 64, 2 / 128]
    assert [x.p_holm for x in rows] == [2 / 64, 4 / 128]
    assert rows[0].detectable == paired.detectable(20, 8 / 22, 0.025)


def test_without_a_base_there_is_no_comparison():
    (row,) = results([scored("a", [1.0, 0.0, 1.0], None)])
    assert (row.base, row.difference, row.flips, row.p_value, row.detectable) == (None,) * 5
    assert row.level == "none"
    assert row.ours == paired.proportion(2, 3)


def test_perplexity_beside_accuracy():
    ours, base = [-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]
    of = {"acc": [1.0, 0.0, 0.0], "log_likelihood": ours}
    x = Scored("l", "cloze", "acc", 0, "f", "a", of, {"acc": [1.0] * 3, "log_likelihood": base})
    found = results([x])[0].also["perplexity"]
    assert found["ours"].value == pytest.approx(math.exp(2))
    assert found["base"].value == pytest.approx(math.e)
    assert found["ratio"].value == pytest.approx(math.e)
    assert found["ratio"].low < 1 < found["ratio"].high


def test_scores_between_right_and_wrong_are_tested_by_sign_flips():
    base = [0.5 + 0.01 * i for i in range(30)]
    (worse,) = results([scored("f", [x - 0.2 - 0.001 * i for i, x in enumerate(base)], {"acc": base})])
    assert worse.level == "loss"
    assert worse.flips is None
    assert worse.p_value == pytest.approx(1 / 10_001)
    (same,) = results([scored("f", [x + (-1) ** i * 0.1 for i, x in enumerate(base)], {"acc": base})])
    assert same.level == "unsure"
    assert same.p_value == 1.0
