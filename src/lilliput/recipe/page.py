"""A method's page, and what its recipes had when they were measured."""

from __future__ import annotations

import functools

from lilliput.methods import measured
from lilliput.methods.index import options
from lilliput.recipe.load import described, load
from lilliput.verbs.spec import Method


def page(method: Method) -> str:
    """A method's page in Markdown: its docstring, what it reads and writes, its options and the ids it covers."""
    summary, _, body = method.doc.partition("\n")
    lines = [f"# {method.name}", "", summary, "", *(["```text", body.strip(), "```", ""] if body.strip() else [])]
    lines += [
        f"- paper: {method.spec.paper}",
        f"- verb: `{method.spec.verb}`",
        f"- needs: {', '.join(sorted(method.spec.needs)) or 'no statistics'}",
        f"- writes: {method.spec.writes}",
    ]
    if isinstance(method.recipe, str):
        lines += [f"- no recipe: {method.recipe}"]
    if method.spec.baseline is not None:
        lines += [f"- has to beat: `{method.spec.baseline}`"]
    rows = options(method)
    lines += ["", "## Options", ""]
    if rows:
        lines += ["| option | type | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [f"| `{r['name']}` | {r['type']} | `{_plain(r['default'])}` | {r['description']} |" for r in rows]
    else:
        lines += ["None."]
    if method.spec.covers:
        lines += ["", "## Covers", ""]
        for key, steps in method.spec.covers.items():
            how = f"`lilliput methods {key} --recipe`" if isinstance(steps, list) else "an idea, described above"
            lines += [f"- `{key}`: {f'not to be run: {steps}' if isinstance(steps, str) else how}"]
    recipes = {name: description for name, description in described().items() if method.name in _methods(name)}
    if recipes:
        lines += ["", "## Named recipes", "", *(f"- `{name}`: {description}" for name, description in recipes.items())]
    rows_measured = measured.of(method.name)
    if rows_measured:
        lines += ["", "## Measured", "", measured.figures()["protocol"], "", *measured.table(rows_measured)]
    return "\n".join(lines) + "\n"


@functools.cache
def _methods(recipe: str) -> frozenset[str]:
    return frozenset(step.method for step in load(recipe).steps)


def _plain(value: object) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
