"""Recipes from YAML and back: files, names and text, with settings on top."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from lilliput.anatomy.tables import EMBED, HEAD
from lilliput.errors import PlanError, nearest
from lilliput.formats import scales
from lilliput.methods import get
from lilliput.methods.index import steps_of
from lilliput.recipe.schema import Recipe, Step, Where
from lilliput.target import Target

_NAMED = "lilliput.recipe.named"  # where the recipes of the package lie


def _yaml() -> YAML:
    """YAML 1.2, in which 2:4 is text and 1e-3 a number. No tag makes an object, and no key stands twice."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 100
    return yaml


def _dumped(data: Mapping[Any, Any]) -> str:
    text = io.StringIO()
    _yaml().dump(data, text)
    return text.getvalue()


def load(what: str | Path) -> Recipe:
    """The recipe that `what` means: a .yaml file, a named recipe, a method's default, a catalogue id, or YAML text.

    Text is recognised by its line break. Methods and options are checked here. Raises PlanError with the file and the
    line, or with the nearest name.
    """
    text = str(what)
    if "\n" in text:
        return parse(text)
    path = Path(what)
    if path.suffix in (".yaml", ".yml", ".json") or path.is_file():
        if not path.is_file():
            raise PlanError(f"no recipe file {path}: give a file that exists, or one of {', '.join(named())}")
        return parse(path.read_text(encoding="utf-8"), str(path), path.stem)
    if text in named():
        inside = resources.files(_NAMED).joinpath(f"{text}.yaml")
        return parse(inside.read_text(encoding="utf-8"), f"recipe {text}", text)
    return parse(_dumped({"name": text, "steps": steps_of(text, also=named())}), f"recipe {text}", text)


def named() -> tuple[str, ...]:
    """Names of the recipes that come with the package, sorted."""
    files = (Path(x.name) for x in resources.files(_NAMED).iterdir())
    return tuple(sorted(x.stem for x in files if x.suffix == ".yaml"))


def described() -> Mapping[str, str]:
    """What each of the named recipes is, in their own words: the comment that its file begins with."""
    descriptions = {}
    for name in named():
        lines = resources.files(_NAMED).joinpath(f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
        descriptions[name] = " ".join(line.removeprefix("#").strip() for line in comment)
    return descriptions


def parse(text: str, source: str = "recipe", name: str = "custom") -> Recipe:
    """YAML text to a Recipe whose methods and options exist. `source` is named in errors, with the line."""
    try:
        root = _yaml().compose(text)
        data = _yaml().load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f", line {mark.line + 1}"
        raise PlanError(f"{source}{line}: not valid YAML: {error.problem}") from None
    except (YAMLError, ValueError) as error:  # the latter for a date that there is not
        raise PlanError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise PlanError(f"{source}: a recipe is a mapping with the key 'steps', not {type(data).__name__}")
    try:
        recipe = Recipe.model_validate({"name": name, **data})
    except ValidationError as error:
        first = error.errors()[0]
        place = f"{source}, line {_line(root, first['loc'])}"
        raise PlanError(f"{place}: {_explain(first)}") from None
    return _checked(recipe, [f"{source}, line {_line(root, ('steps', i))}: " for i in range(len(recipe.steps))])


def with_settings(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """The recipe with `STEP.KEY=VALUE` settings applied in order; values are YAML.

    STEP is a method's name, "embed" or "lm_head" for the step on that table alone, or the number of the step from 0
    where a name means several. KEY is a field of the target, an option of the method, or `include` / `exclude`. Raises
    PlanError with the nearest name.
    """
    steps = list(recipe.steps)
    for setting in settings:
        place, equals, value = setting.partition("=")
        step, dot, key = place.strip().rpartition(".")
        if not (equals and dot and step and key):
            raise PlanError(f"a setting is written STEP.KEY=VALUE, such as gptq.bits=3, not '{setting}'")
        try:
            parsed = _yaml().load(value)
        except (YAMLError, ValueError):
            raise PlanError(f"setting '{setting}': the value is not YAML; quote it if it is text") from None
        index = _find(steps, step, setting)
        steps[index] = _set(steps[index], key.replace("-", "_"), parsed, setting)
    return _checked(recipe.model_copy(update={"steps": tuple(steps)}), [""] * len(steps))


def to_yaml(recipe: Recipe) -> str:
    """YAML that `load` reads back as an equal recipe; defaults are left out."""
    data = recipe.model_dump(mode="json", exclude_defaults=True)
    ordered = {key: data[key] for key in ("name", "export", "steps") if key in data}
    return _dumped(ordered)


def _find(steps: Sequence[Step], name: str, setting: str) -> int:
    if name.isdecimal():
        if int(name) >= len(steps):
            raise PlanError(f"setting '{setting}': there is no step {name}; steps count from 0 to {len(steps) - 1}")
        return int(name)
    tables = [i for i, step in enumerate(steps) if set(step.where.include) <= {EMBED, HEAD}]
    table, name = name.replace("-", "_"), name.replace("_", "-")
    if table in (EMBED, HEAD):
        matches = [i for i in tables if table in steps[i].where.include]
    else:
        matches = [i for i, step in enumerate(steps) if step.method == name]
        # A method's name is that of its step on the blocks; the one on the tables is called by what it covers.
        matches = [i for i in matches if i not in tables] or matches
    if len(matches) > 1:
        numbers = " and ".join(str(i) for i in matches)
        raise PlanError(f"setting '{setting}': '{name}' is steps {numbers}; write the number instead of the name")
    if not matches:
        raise PlanError(f"setting '{setting}': no step '{name}'.{nearest(name, {x.method for x in steps})}")
    return matches[0]


def _set(step: Step, key: str, value: Any, setting: str) -> Step:
    method = get(step.method)
    options = method.options.model_fields
    data = step.model_dump(exclude_unset=True)
    if key in options and not method.spec.targeted:
        data["options"] = {**data.get("options", {}), key: value}
    elif key in Where.model_fields:
        entries = value if isinstance(value, list) else [x.strip() for x in str(value).split(",") if x.strip()]
        data["where"] = {**data.get("where", {}), key: entries}
    elif key in Target.model_fields:
        data["target"] = {**data.get("target", {}), key: value}
    elif key in options:
        data["options"] = {**data.get("options", {}), key: value}
    else:
        fields = {*Target.model_fields, *Where.model_fields, *options}
        raise PlanError(f"setting '{setting}': '{step.method}' has no '{key}'.{nearest(key, fields)}")
    try:
        return Step.model_validate(data)
    except ValidationError as error:
        raise PlanError(f"setting '{setting}': {_explain(error.errors()[0])}") from None


def _checked(recipe: Recipe, places: Sequence[str]) -> Recipe:
    """The recipe itself, once every method exists and takes its options."""
    for step, place in zip(recipe.steps, places, strict=True):
        try:
            get(step.method).parse(step.options)
            scales.parse(step.target.scale_dtype)
        except PlanError as error:
            raise PlanError(f"{place}{error}") from None
    return recipe


def _line(root: Node | None, path: Sequence[int | str]) -> int:
    """The line, from 1, of the deepest node on `path` that exists."""
    line = 1
    node = root
    for key in path:
        if isinstance(node, MappingNode):
            pairs = [(k, v) for k, v in node.value if k.value == key]
            if not pairs:
                break
            line, node = pairs[0][0].start_mark.line + 1, pairs[0][1]
        elif isinstance(node, SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _explain(error: ErrorDetails) -> str:
    """One sentence for a pydantic error: the key, the rule, and what was given."""
    place = [str(x) for x in error["loc"]]
    if error["type"] == "extra_forbidden":
        models: Mapping[str, type[BaseModel]] = {"target": Target, "where": Where}
        parent = next((x for x in reversed(place[:-1]) if not x.isdecimal()), "")
        model = models.get(parent, Step if parent == "steps" else Recipe)
        return f"unknown key '{place[-1]}'.{nearest(place[-1], model.model_fields)}"
    if error["type"] == "missing":
        return f"the key '{place[-1]}' is missing"
    message = error["msg"].removeprefix("Value error, ")
    keys = [x for x in place if x not in ("int", "literal['auto','channel','tensor']")]
    return f"'{'.'.join(keys)}': {message[0].lower()}{message[1:]}, got {error['input']!r}"
