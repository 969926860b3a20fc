"""The method index: every file says what it is, and every id it covers can be run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lilliput import api
from lilliput.errors import PlanError
from lilliput.methods import discover, get, verbs
from lilliput.methods import index as catalogue
from lilliput.recipe import page
from lilliput.recipe.load import load, to_yaml
from lilliput.recipe.schema import Where
from lilliput.stats.fold import NAMES
from lilliput.target import Target
from lilliput.verbs.spec import FISHER, Method

METHODS = sorted(discover().values(), key=lambda method: method.name)
IDS = [(method.name, key) for method in METHODS for key in method.spec.covers]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_method_file_is_complete(method: Method) -> None:
    assert method.summary.endswith(".")
    assert method.spec.paper
    assert "replace:" not in method.doc + method.spec.paper
    assert set(method.spec.needs) <= {*NAMES, FISHER}
    kinds = ("quantized", "parts", "support", "fold", "targets", "behaviour", "inputs", "cache", "values")
    assert method.spec.writes in kinds
    assert verbs()[method.spec.family] is type(method.spec)
    assert method.spec.baseline is None or get(method.spec.baseline).spec.baseline is None
    assert method.spec.baseline != method.name
    doc = method.doc.lower()
    assert all(word in doc for word in ("paper", "cost", "limits"))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_options_have_defaults_and_hide_no_key(method: Method) -> None:
    assert method.parse({}) == method.options()
    taken = {*(Target.model_fields if method.spec.targeted else ()), *Where.model_fields}
    assert not taken & set(method.options.model_fields), "settings could not tell which is meant"
    for row in catalogue.options(method):
        assert row["description"], f"option '{row['name']}' says nothing"


@pytest.mark.parametrize(("name", "key"), IDS)
def test_every_covered_id_has_a_recipe_that_runs_its_method(name: str, key: str) -> None:
    steps = get(name).spec.covers[key]
    if not isinstance(steps, list):
        why = "not a computation" if steps is None else steps[:40]
        with pytest.raises(PlanError, match=why):
            load(key)
        return
    recipe = load(key)
    named = {str(step.options.get("objective", "")) for step in recipe.steps}
    assert name in {step.method for step in recipe.steps} | named
    assert load(to_yaml(recipe)).steps == recipe.steps


@pytest.mark.parametrize("name", sorted({*discover(), *catalogue.covering()}))
def test_a_printed_recipe_is_one_that_plans(tiny: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Or the command says why there is none, and where to read."""
    method = catalogue.find(name)
    steps = method.spec.covers.get(name, method.recipe if name == method.name else None)
    if isinstance(steps, list):
        routed = method.name in ("expert-pruning", "expert-merging", "router-pruning")
        model = tiny("mixtral" if routed else "qwen2")
        told = [(n, get(x.method).options.model_fields) for n, x in enumerate(load(name).steps)]
        short = [f"{n}.tokens=16" for n, fields in told if "tokens" in fields]
        (tmp_path / "few.txt").write_text("Some words of one text.")
        short += [f"{n}.text={tmp_path / 'few.txt'}" for n, fields in told if "text" in fields]
        planned = api.plan(model, recipe=to_yaml(load(name)), samples=2, tokens=16, device="cpu", settings=short)
        assert planned.bytes > 0
        return
    with pytest.raises(PlanError, match=rf"{name}'.*: (read|.*; read) about it with `lilliput methods {method.name}`"):
        load(name)


def test_methods_that_need_company_bring_it() -> None:
    assert [step.method for step in load("spinquant").steps] == [
        "spinquant",
        "online-hadamard",
        "gptq",
        "act-static-dynamic",
    ]
    assert [step.method for step in load("slicegpt").steps] == ["principal", "slicegpt"]


def test_no_id_is_covered_twice() -> None:
    assert len(catalogue.covering()) == len(IDS)


def test_the_index_is_json_with_a_recipe_or_documentation_for_each_id() -> None:
    entries = json.loads(json.dumps(catalogue.index()))
    assert [entry["name"] for entry in entries] == [method.name for method in METHODS]
    for entry in entries:
        assert {"name", "verb", "summary", "paper", "needs", "writes", "covers"} <= entry.keys()
        for covered in entry["covers"]:
            assert ("recipe" in covered) != (covered.get("documentation") is True)
            if "recipe" in covered:
                assert load(json.dumps(covered["recipe"], indent=1)).steps == load(covered["id"]).steps


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_page_shows_docstring_options_and_ids(method: Method) -> None:
    text = page.page(method)
    body = method.doc.partition("\n")[2].strip()
    assert body in text
    assert all(f"`{key}`" in text for key in (*method.options.model_fields, *method.spec.covers))


def test_unknown_names_hint_at_the_nearest() -> None:
    with pytest.raises(PlanError, match="Did you mean 'gptq'"):
        get("gtpq")
    with pytest.raises(PlanError, match="Did you mean 'range-calibration'"):
        catalogue.find("range-calibraton")
