"""The recipe that finds the best composition of a size: who gets which grid is measured, then GPTQ puts it in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lilliput import methods
from lilliput.anatomy.tables import EMBED, HEAD
from lilliput.budget import menu
from lilliput.errors import PlanError
from lilliput.options import Fit
from lilliput.recipe.schema import Recipe, Step, Where
from lilliput.target import Target

ENGINE: Literal["compressed-tensors"] = "compressed-tensors"
_FITTED = Step(method="signround", options={"iters": 30, "batch": 4})  # that of w3-fit and w4-fit
_USUAL = {None: menu.DEFAULT, "gguf": "gguf"}  # menus by container


def compose(fit: Fit, folds: bool = True) -> Recipe:
    """The recipe. Embedding and head take part natively and in a container, where a size is to be kept: an average of
    bits is one of linears. `folds`: the model has links along which AWQ can move scales.

    Raises PlanError for a goal that cannot be, and for a menu that is none.
    """
    goals = [x for x in (fit.size, fit.bits, fit.decoding) if x is not None]
    if len(goals) != 1:
        advice = "give --size, --bits or --decode-time"
        advice += " and only one of them: they contradict each other" if goals else ""
        raise PlanError(f"{advice} for the best composition that keeps to it, or a --recipe")
    if fit.bits is not None and not 0 < fit.bits <= 16:
        raise PlanError(f"--bits {fit.bits} is no average of bits a weight: give a number such as 3.5")
    if fit.size is not None and fit.size <= 0:
        raise PlanError(f"--size {fit.size} is no size of a model: give one such as 400MB")
    _check_context(fit)
    names = fit.menu or (_usual(fit),)
    entries = menu.entries(names)
    menu.check(entries, fit.to)
    engine = names == (ENGINE,)
    if engine and fit.context is not None:
        raise PlanError(
            f"--context chooses how the model stores keys and values, which only the native layout says: take --menu "
            f"{menu.DEFAULT} or integers in place of {ENGINE}"
        )
    tables = (EMBED, HEAD) if fit.size is not None and not engine else ()
    where = Where(include=("*", *tables), exclude=("router",) if tables else Where().exclude)
    plain = [x for x in entries if not menu.turned(menu.on(Target(), x)) and not menu.pruned(menu.on(Target(), x))]
    if fit.fit_blocks:
        _check_fitted(entries)
    options: dict[str, Any] = {"menu": list(names), "size": fit.size, "average": fit.bits, "fused": engine}
    options |= {"context": fit.context}
    options |= {} if fit.decoding is None else {"seconds": fit.decoding.seconds, "device": fit.decoding.device}
    # The least that any linear can have: what is shown before anything is measured.
    least = min(map(menu.fields, plain or entries), key=lambda x: (x.get("bits") or 8, x.get("group_size", 0)))
    # AWQ looks at what the sweep to come pays, which depends little on the grid: its own is one of 3 bits.
    awq = Step(
        method="awq",
        target=Target(bits=3, symmetric=all(menu.fields(x)["symmetric"] for x in entries)),
        options={"judge": "sweep", "rows": 256, "grid": 2},
    )
    narrowest = {"group_size": "channel", "scale_dtype": "auto"} if "bits" in least else {}
    target = Target.model_validate({**least, **narrowest})
    return Recipe(
        name=f"fit-{_goal(fit)}",
        export=_layout(fit, names),
        steps=(
            *((awq,) if folds and len(plain) == len(entries) else ()),
            Step(method="menu", options={k: v for k, v in options.items() if v is not None}, where=where),
            _solver(entries, plain, target, where),
            *((_FITTED,) if fit.fit_blocks else ()),
        ),
    )


def _layout(fit: Fit, names: Sequence[str]) -> Literal["auto", "compressed-tensors", "lilliput"]:
    if names == (ENGINE,):
        return ENGINE
    return "lilliput" if fit.to or fit.context is not None or names == (menu.DEFAULT,) else "auto"


def _check_context(fit: Fit) -> None:
    """Raises PlanError where keys and values cannot count in what is asked for."""
    if fit.context is None:
        return
    if fit.context < 1:
        raise PlanError(f"--context {fit.context} is no number of tokens: give one such as 8192")
    if fit.size is None:
        option = "--bits" if fit.bits is not None else "--decode-time"
        raise PlanError(
            f"--context counts keys and values in a budget of bytes, and {option} is none: give --size in its "
            "place, or leave --context out"
        )
    if fit.to is not None:
        raise PlanError(
            f"--context chooses how the model stores keys and values, which a {fit.to} file does not say: leave --to "
            "out, or --context"
        )


def _usual(fit: Fit) -> str:
    if fit.to not in _USUAL:
        raise PlanError(f"no menu is known for {fit.to}: name grids that it holds with --menu")
    # Only what engines have kernels for decodes faster.
    return ENGINE if fit.decoding is not None and fit.to is None else _USUAL[fit.to]


def _solver(entries: Sequence[str], plain: Sequence[str], target: Target, where: Where) -> Step:
    """What puts the chosen grids in. Coordinate descent after the sweep takes a twentieth of the loss off integers."""
    if len(plain) < len(entries):
        return Step(method="mixed", target=target, where=where)
    integers = all(menu.fields(x)["format"] == "int" for x in entries)
    return Step(method="gptq", target=target, where=where, options={"refine": 2} if integers else {})


def _check_fitted(entries: Sequence[str]) -> None:
    """Raises PlanError for an entry whose codes no step fits."""
    fitted = methods.get(_FITTED.method).spec.formats or ()
    for entry in entries:
        if menu.fields(entry)["format"] not in fitted:
            raise PlanError(
                f"--fit-blocks: the codes of {entry} cannot be fitted: take --menu integers, compressed-tensors or "
                "gguf, or leave it out"
            )


def _goal(fit: Fit) -> str:
    if fit.decoding is not None:
        return f"{1e3 * fit.decoding.seconds:g}-ms"
    return f"{fit.bits:g}-bits" if fit.bits is not None else f"{fit.size}-bytes"
