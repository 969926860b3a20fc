"""The recipe that finds the best composition of a size: who gets which grid is measured, then GPTQ puts it in."""

from __future__ import annotations

from lilliput.anatomy.tables import EMBED, HEAD
from lilliput.budget import menu
from lilliput.errors import PlanError
from lilliput.options import Fit
from lilliput.recipe.schema import Recipe, Step, Where
from lilliput.target import Target

ENGINE = "compressed-tensors"


def compose(fit: Fit) -> Recipe:
    """The recipe. Embedding and head take part natively and where a size is to be kept: an average of bits is one of
    linears. Raises PlanError for a goal that cannot be, and for a menu that is none."""
    if (fit.size is None) == (fit.bits is None):
        advice = "give --size or --bits" if fit.size is None else "--size and --bits contradict each other: give one"
        raise PlanError(f"{advice} for the best composition within it, or a --recipe")
    if fit.bits is not None and not 0 < fit.bits <= 16:
        raise PlanError(f"--bits {fit.bits} is not a valid average of bits a weight: give a number such as 3.5")
    menu_entries = fit.menu or (menu.DEFAULT,)
    entries = menu.entries(menu_entries)
    engine = menu_entries == (ENGINE,)
    tables = (EMBED, HEAD) if fit.size is not None and not engine else ()
    where = Where(include=("*", *tables), exclude=("router",) if tables else Where().exclude)
    options = {"menu": list(menu_entries), "size": fit.size, "average": fit.bits, "fused": engine}
    # The least that any linear can have: what is shown before anything is measured.
    least = min(map(menu.fields, entries), key=lambda x: (x.get("bits") or 8, x.get("group_size", 0)))
    target = Target.model_validate({**least, "group_size": "channel"})
    goal = f"{fit.bits:g}-bits" if fit.bits is not None else f"{fit.size}-bytes"
    return Recipe(
        name=f"fit-{goal}",
        export=ENGINE if engine else "lilliput" if menu_entries == (menu.DEFAULT,) else "auto",
        steps=(
            Step(method="menu", options={k: v for k, v in options.items() if v is not None}, where=where),
            Step(method="gptq", target=target, where=where),
        ),
    )
