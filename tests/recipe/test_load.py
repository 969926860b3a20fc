"""Recipes: what a name means, what a setting reaches, and how mistakes are named."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest

from lilliput import api
from lilliput.errors import PlanError
from lilliput.methods import get
from lilliput.recipe import page
from lilliput.recipe.load import described, load, named, to_yaml, with_settings
from lilliput.recipe.schema import Recipe, Step, Where
from lilliput.target import Target

COMPOSED = """\
steps:
  - method: rtn
    target: {bits: 8}
  - method: gptq
    target: {bits: 4, group_size: 64, symmetric: false}
    options: {act_order: true}
    where: {exclude: [lm_head]}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text)
    return path


def test_a_file_is_read(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, COMPOSED))
    assert recipe.name == "r"
    assert [step.method for step in recipe.steps] == ["rtn", "gptq"]
    second = recipe.steps[1]
    assert second.target == Target(bits=4, group_size=64, symmetric=False)
    assert dict(second.options) == {"act_order": True}
    assert second.where == Where(exclude=("lm_head",))
    assert load(COMPOSED).steps == recipe.steps


def test_yaml_round_trip() -> None:
    for recipe in (load(COMPOSED), *(load(name) for name in ("w4", "gptq", "rtn"))):
        again = load(to_yaml(recipe))
        assert again == recipe
        assert "&" not in to_yaml(recipe)


@pytest.mark.parametrize("name", named())
def test_named_recipes_load_and_are_short(name: str) -> None:
    recipe = load(name)
    assert recipe.name == name
    text = resources.files("lilliput.recipe.named").joinpath(f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert len(text.splitlines()) < 30


PAPERS = ("bcq", "gptq", "loftq", "owq", "quip", "spqr")


@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_settings_plan_and_say_what_differs(tiny: Callable[[str], Path], name: str) -> None:
    ours, theirs = load(name), load(f"{name}-paper")
    assert [step.method for step in theirs.steps] == [name]
    assert (theirs.steps[0].target, theirs.steps[0].options) != (ours.steps[0].target, ours.steps[0].options)
    told = described()[f"{name}-paper"]
    assert re.search(r"\(.+ et al\. 20\d\d, arXiv \d{4}\.\d{5}\)", told)
    assert f"The default `{name}`" in told
    assert api.plan(tiny("qwen2"), recipe=f"{name}-paper", samples=2, tokens=16, device="cpu").bytes > 0
    assert told in page.page(get(name))


def test_the_default_loads_everywhere() -> None:
    assert api.DEFAULT_RECIPE in named()
    last = load(api.DEFAULT_RECIPE).steps[-1].target
    assert (last.bits, last.symmetric, last.group_size) == (4, True, "auto")


def test_methods_and_catalogue_ids_are_recipes() -> None:
    assert load("gptq").steps[-1].method == "gptq"
    assert load("gptq").steps[-1].target.bits is not None
    assert load("range-calibration").steps[0].method == "rtn"
    assert load("range_calibration") == load("range-calibration").model_copy(update={"name": "range_calibration"})


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("gptk", "Did you mean 'gptq'?"),
        ("smoothqant-w8", "Did you mean 'smoothquant-w8'?"),
        ("ptq-vs-qat", "an idea, not a computation"),
        ("nowhere.yaml", "no recipe file nowhere.yaml"),
        ("steps: [\n", "line 2: not valid YAML"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("steps: []\n", "line 1: 'steps'"),
        (
            "name: x\nsteps:\n  - method: gptq\n    method: rtn\n",
            'line 4: not valid YAML: found duplicate key "method"',
        ),
        ("name: !!python/name:os.system x\nsteps: []\n", "line 1: not valid YAML: could not determine a constructor"),
        ("name: 2001-99-99\nsteps: []\n", "not valid YAML: month must be in 1..12"),
        ("stpes: []\n", "the key 'steps' is missing"),
        ("name: x\nsteps:\n  - method: gptk\n", "line 3: unknown method 'gptk'. Did you mean 'gptq'?"),
        ("steps:\n  - method: gptq\n    options: {act_ordr: true}\n", "Did you mean 'act_order'?"),
        ("steps:\n  - method: gptq\n    target:\n      bist: 4\n", "line 4: unknown key 'bist'. Did you mean 'bits'?"),
        ("steps:\n  - method: gptq\n    target:\n      bits: 9\n", "line 4: 'steps.0.target.bits'"),
        ("steps:\n  - method: gptq\n    target: {group_size: 0}\n", "a group has at least one input"),
        ("steps:\n  - method: gptq\n    where: {exclud: []}\n", "Did you mean 'exclude'?"),
        ("steps:\n  - method: gptq\n    wher: {}\n", "Did you mean 'where'?"),
        ("steps:\n  - method: wanda\n    target: {pattern: 5:4}\n", "such as 2:4, not '5:4'"),
        ("steps:\n  - target: {bits: 4}\n", "line 2: the key 'method' is missing"),
    ],
)
def test_mistakes_are_named(what: str, said: str) -> None:
    with pytest.raises(PlanError) as error:
        load(what)
    assert said in str(error.value)


def test_a_file_is_named_in_its_errors(tmp_path: Path) -> None:
    path = write(tmp_path, COMPOSED.replace("bits: 8", "bits: eight"))
    with pytest.raises(PlanError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}, line 3: 'steps.0.target.bits'")


def test_settings_reach_target_options_and_where() -> None:
    recipe = with_settings(
        load(COMPOSED),
        [
            "gptq.bits=3",
            "gptq.group-size=channel",
            "gptq.symmetric=true",
            "gptq.act_order=false",
            "gptq.exclude=lm_head, *.q_proj",
            "rtn.include=[a, b]",
            "0.bits=6",
        ],
    )
    rtn, gptq = recipe.steps
    assert gptq.target == Target(bits=3, group_size="channel", symmetric=True)
    assert dict(gptq.options) == {"act_order": False}
    assert gptq.where.exclude == ("lm_head", "*.q_proj")
    assert rtn.where == Where(include=("a", "b"))
    assert rtn.target.bits == 6


def test_yaml_means_what_people_expect() -> None:
    steps = load("steps:\n  - method: gptq\n    target: {pattern: 2:4}\n    options: {damping: 1e-3}\n").steps
    assert steps[0].target.pattern == "2:4"
    assert steps[0].options["damping"] == 1e-3
    assert with_settings(load("gptq"), ["gptq.pattern=4:8"]).steps[-1].target.pattern == "4:8"


def test_later_settings_win_and_the_recipe_given_stays() -> None:
    recipe = load(COMPOSED)
    assert with_settings(recipe, ["gptq.bits=3", "gptq.bits=2"]).steps[1].target.bits == 2
    assert with_settings(recipe, []) == recipe
    assert recipe == load(COMPOSED)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("gptq", "STEP.KEY=VALUE"),
        ("bits=4", "STEP.KEY=VALUE"),
        ("gptk.bits=4", "no step 'gptk'. Did you mean 'gptq'?"),
        ("gptq.act_ordr=true", "has no 'act_ordr'. Did you mean 'act_order'?"),
        ("gptq.bits=99", "'target.bits'"),
        ("gptq.act_order=maybe", "option 'act_order' of method 'gptq'"),
        ("gptq.bits=[", "is not YAML"),
        ("7.bits=4", "steps count from 0 to 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting: str, said: str) -> None:
    with pytest.raises(PlanError) as error:
        with_settings(load(COMPOSED), [setting])
    assert said in str(error.value)


def test_a_method_that_occurs_twice_needs_its_number() -> None:
    recipe = Recipe(steps=(Step(method="rtn"), Step(method="rtn")))
    with pytest.raises(PlanError, match="steps 0 and 1"):
        with_settings(recipe, ["rtn.bits=4"])
    assert [s.target.bits for s in with_settings(recipe, ["1.bits=4"]).steps] == [None, 4]


def test_settings_reach_the_step_on_the_blocks_or_that_on_the_tables() -> None:
    changed = with_settings(load("w4"), ["gptq.bits=3", "embed.bits=8", "lm_head.group_size=channel"])
    assert [step.target.bits for step in changed.steps] == [None, 3, 8]
    assert changed.steps[-1].target.group_size == "channel"
    with pytest.raises(PlanError, match="no step 'embed'"):
        with_settings(load("gptq"), ["embed.bits=8"])
