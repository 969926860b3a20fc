"""What a reader of a plan would not expect, in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lilliput import units
from lilliput.model.edited import fewer_tokens, spreads, unedited
from lilliput.model.weights import Model
from lilliput.parts.quantized import QuantizedSpec
from lilliput.parts.scheme import Scheme
from lilliput.plan import caching, training
from lilliput.plan.contexts import Context
from lilliput.plan.resolve import Resolved
from lilliput.plan.tensors import TensorPlan
from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import Fewer

ROUNDED = 0.02  # of what there was: differences that are not worth a word

_SPREAD = (
    "Each block becomes as wide as its scores say, at as many weights in all: the sizes shown are those of equal "
    "widths. transformers opens the folder after `import lilliput`; other engines have one width for all blocks."
)


def remarks(
    model: Model,
    resolved: Resolved,
    tensors: Sequence[TensorPlan],
    layout: str | None,
    processes: int,
    context: Context | None = None,
    teacher: Model | None = None,
) -> tuple[str, ...]:
    """What the layout says, bytes that stay wide, layers that a step leaves alone, sizes that calibration decides, and
    a teacher of another size."""
    spread = _SPREAD if spreads(model) else None
    told = (
        layout,
        spread,
        fewer_tokens(model),
        _thinner(model, resolved),
        _wide(tensors),
        *_steps(resolved),
        *(caching.notes(model, resolved) if context is None else context.notes(model, resolved)),
        *training.notes(resolved, model, teacher),
        *model.anatomy().notes,
        _shared(processes),
    )
    return tuple(x for x in told if x)


def _thinner(model: Model, resolved: Resolved) -> str:
    """What leaves in truth, where sizes do not hold the ratio that was asked for; "" where they nearly do."""
    edits = [x for x in resolved.tasks if isinstance(x.spec, Edit) and not isinstance(x.options, Fewer)]
    rated = [(x.label, getattr(x.options, "ratio", None)) for x in edits]
    before = unedited(model)
    if len(rated) != 1 or before is model or not (ratio := rated[0][1]):
        return ""
    pair = (before, model)
    hidden = [x.skeleton.hidden_size for x in pair]
    heads = [int(getattr(x.skeleton.config, "num_attention_heads", 0) or 0) for x in pair]
    sizes = [[x.parameters for x in m.anatomy().blocks[0].linears if x.expert is None] for m in pair]
    weights = [sum(x.parameters for block in m.anatomy().blocks for x in block.linears) for m in pair]
    if hidden[0] != hidden[1]:
        left, what = hidden, "of the residual stream's channels leave"
    elif heads[0] != heads[1] and any(x == y for x, y in zip(*sizes, strict=True)):
        left, what = heads, "of the heads leave"  # and the MLP stays
    else:
        left, what = weights, "of the blocks' weights leave"
    share = 1 - left[1] / left[0]
    if abs(share - ratio) < ROUNDED:
        return ""
    return f"{rated[0][0]}: {share:.1%} {what}, where {ratio:.1%} was asked for: sizes go in steps."


def _wide(tensors: Sequence[TensorPlan]) -> str:
    """Which share of the bytes is left in 16 bits or more, and in what; "" where little is."""
    kinds: Counter[str] = Counter()
    for x in tensors:
        if x.kind != "quantized" and x.dtype.is_floating_point and x.dtype.itemsize > 1:
            kinds[x.kind] += x.nbytes
    whole = sum(x.nbytes for x in tensors)
    if kinds.total() == whole or kinds.total() * 20 < whole:
        return ""
    shares = ", ".join(f"{kind} {units.size(size)}" for kind, size in kinds.most_common() if size * 100 >= whole)
    return f"{kinds.total() / whole:.0%} of the bytes stay in 16 bits or more: {shares}."


def _steps(resolved: Resolved) -> tuple[str, ...]:
    """What the steps do that their names do not say."""
    unchanged = [
        x.name
        for x in resolved.linears
        if x.tasks
        and x.scheme == Scheme()
        and x.sparsity is None
        and not any(task.spec.plain(task.options) for task in x.tasks)
    ]
    notes = [*resolved.notes]
    notes += [task.spec.note for task in resolved.tasks if task.spec.note is not None]
    if unchanged:
        notes.append(
            f"{len(unchanged)} linears are left unchanged: two factors of that rank would be no smaller "
            f"({units.few(unchanged)})."
        )
    filled = [
        x.name for x in resolved.linears if x.sparsity is None and any(t.spec.writes == "support" for t in x.tasks)
    ]
    if filled:
        notes.append(
            f"{len(filled)} linears are pruned and then compensated by a product that reaches every weight: what they "
            f"compute with keeps no zeros ({units.few(filled)})."
        )
    formats = [part.format for x in resolved.linears for part in x.scheme.parts if isinstance(part, QuantizedSpec)]
    remarks = dict.fromkeys(form.remark() for form in dict.fromkeys(formats))
    return (*notes, *(x for x in remarks if x is not None))


def _shared(processes: int) -> str:
    """What several processes are told; "" for one."""
    if processes == 1:
        return ""
    return f"{processes} processes share the calibration samples; --memory and the planned peak apply to each"
