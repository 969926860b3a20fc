"""Tasks by ability and items by category, each with its own paired test."""

from __future__ import annotations

import json

import pytest

from lilliput.metrics import paired
from lilliput.metrics.paired import Flips
from lilliput.tasks.abilities import by_category, count, pooled
from lilliput.tasks.files import load_task, parse
from lilliput.tasks.result import Scored, abilities, results
from lilliput.tasks.shapes import ability_of, table


def scored(name, ability, lost, items=100, **more):
    base = [1.0] * items
    return Scored(
        name,
        "choice",
        "acc",
        0,
        "f",
        "x",
        {"acc": [0.0] * lost + [1.0] * (items - lost)},
        {"acc": base},
        ability=ability,
        **more,
    )


def test_tasks_are_pooled_by_ability():
    rows = results([scored("a", "reasoning", 4), scored("b", "reasoning", 5), scored("c", "language", 0)])
    found = abilities(rows)
    assert [(x.name, x.tasks, x.items) for x in found] == [
        ("reasoning", ("a", "b"), 200),
        ("language", ("c",), 100),
    ]
    assert found[0].flips == Flips(200, 9, 0)
    assert found[0].p_value == paired.mcnemar(9, 0)
    assert found[0].p_holm == pytest.approx(2 * paired.mcnemar(9, 0))
    # What neither task shows by itself, corrected over three, both together do.
    assert [x.level for x in rows[:2]] != ["loss", "loss"]
    assert found[0].level == "loss"
    assert found[0].ours == paired.proportion(191, 200)
    json.dumps([x.to_json() for x in found])


def test_scores_that_are_not_right_or_wrong_have_no_ability():
    x = Scored("f", "harness", "f1", 0, "f", "x", {"f1": [0.5, 0.7]}, {"f1": [0.5, 0.6]})
    assert abilities(results([x])) == ()
    assert abilities(results([Scored("a", "choice", "acc", 0, "f", "x", {"acc": [1.0, 0.0]}, None)])) == ()


def test_categories_of_a_task():
    labels = ("math", "law") * 20
    ours = [0.0, 1.0] * 10 + [1.0, 1.0] * 10
    x = Scored("m", "choice", "acc", 0, "f", "x", {"acc": ours}, {"acc": [1.0] * 40}, categories=labels)
    (row,) = results([x])
    assert [(g.name, g.items, g.level) for g in row.categories] == [("law", 20, "unsure"), ("math", 20, "loss")]
    assert row.categories[1].p_holm == pytest.approx(2 * paired.mcnemar(10, 0))
    assert by_category("t", ("one",) * 4, [1.0] * 4, None) == ()
    alone = by_category("t", ("", "b"), [1.0, 0.0], None)
    assert [(g.name, g.level, g.base) for g in alone] == [("other", "none", None), ("b", "none", None)]


def test_counts_are_added():
    a = count("x", "a", [1.0, 0.0], [1.0, 1.0])
    b = count("x", "b", [1.0, 0.0], [0.0, 0.0])
    (both,) = pooled([a, b])
    assert (both.tasks, both.items, both.ours, both.base, both.flips) == (("a", "b"), 4, 2, 2, Flips(4, 1, 1))


def test_every_known_data_set_says_what_it_asks_for():
    assert {x for x, shapes in table().items() if shapes[0].ability == "other"} == {
        "own",
        "choice",
        "cloze",
        "generate",
    }
    assert ability_of("lambada_openai") == "language"
    assert ability_of("bbh_cot_fewshot_navigate") == "reasoning"
    assert ability_of("mmlu_law") == "other"


def test_rows_say_their_category_and_prompts_do_not_change(jsonl):
    rows = [{"context": f"c{i}", "choices": ["a", "b"], "label": 0} for i in range(3)]
    plain = load_task(parse(f"t={jsonl('plain.jsonl', *rows)}"), shots=1)
    told = [x | extra for x, extra in zip(rows, ({"category": "z"}, {"subject": "s"}, {}), strict=True)]
    task = load_task(parse(f"t={jsonl('told.jsonl', *told)}"), shots=1)
    assert task.categories == ("s", "")
    assert task.fingerprint == plain.fingerprint
