"""How much of two models and of their logits an evaluation holds at a time, so that it stays within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

from lilliput import units
from lilliput.errors import DataError, PlanError
from lilliput.machine import memory as ram
from lilliput.metrics.logits import ROWS, TILE
from lilliput.model.weights import TABLE_ROWS, Model

# Tokens in a forward pass: enough for the matrix products, and few enough for the operations between them to stay in
# the caches (twice as many cost 5 % on a CPU).
PASS = 1024
SLICE = 64 * ram.MB  # of each head in float32
LOGITS = 4 * 4  # bytes that a logit takes: both models', and what is made of them


WINDOW = 1024  # tokens, where nobody says


def window(model: Model) -> int:
    """Tokens in a window where nobody says otherwise: 1,024, or as many as the model knows positions."""
    return tokens([model], None)


def tokens(models: Sequence[Model], count: int | None, most: int = WINDOW) -> int:
    """Tokens in a window that all models can read: `wanted`, or as many as they know positions, up to `most`, where
    nobody says. Raises DataError."""
    if count is None:
        return min(most, *(model.positions or most for model in models))
    if count < 2:
        raise DataError(f"windows of {count} tokens; a prediction needs 2 tokens or more.")
    for model in models:
        if model.positions is not None and count > model.positions:
            raise DataError(
                f"windows of {count} tokens are more than the {model.positions} positions of "
                f"{model.source.model}: ask for fewer."
            )
    return count


def vocabulary(model: Model) -> int:
    """Entries of the head, which may be more than the tokenizer's."""
    return model.skeleton.shapes[model.skeleton.head][0]


def _outside(model: Model, distinct: int, itemsize: int) -> int:
    """Bytes of the embeddings in the compute dtype, of the token table the rows of at most `seen` tokens, and of the
    rows at hand as they are stored."""
    shapes = model.skeleton.shapes
    rows = {n: min(shapes[n][0], max(distinct, TABLE_ROWS)) for n in model.skeleton.embeddings}
    sizes = {n: rows[n] * prod(shapes[n][1:]) for n in rows}
    stored = max((sizes[n] * model.dtype(n).itemsize for n in sizes), default=0)
    return sum(sizes.values()) * itemsize + min(stored, TABLE_ROWS * model.skeleton.hidden_size * 4)


def _block(model: Model, batch: int, tokens: int, itemsize: int) -> int:
    """Bytes of the largest block with the forward pass of one batch through it."""
    skeleton = model.skeleton
    weights, widest = 0, 0
    for i in range(len(skeleton.block_names)):
        shapes = [skeleton.shapes[name] for name in skeleton.names_of(i)]
        weights = max(weights, sum(prod(x) for x in shapes))
        widest = max(widest, *(max(x) for x in shapes if x))
    hidden = model.skeleton.hidden_size
    live = batch * tokens * (4 * widest + 6 * hidden)
    return (weights + live) * itemsize


@dataclass(frozen=True)
class Slices:
    """How an evaluation spends its memory: windows per forward pass, and vocabulary entries of the heads and of the
    logits at a time; and the bytes that it takes beside ram.BASE."""

    batch: int
    columns: int
    tile: int
    bytes: int


def _heads(models: list[Model], columns: int, tile: int, tokens: int) -> int:
    """Bytes of a slice of each head, of the rows that are being cast, and of the logits."""
    hidden = models[0].skeleton.hidden_size
    casting = 8 * min(columns, TABLE_ROWS) * hidden
    return 4 * columns * len(models) * hidden + casting + LOGITS * tile * min(ROWS, tokens)


def _bytes(models: list[Model], batch: int, columns: int, tile: int, tokens: int, distinct: int, itemsize: int) -> int:
    return max(
        max(_outside(m, distinct, itemsize) for m in models),
        max(_block(m, batch, tokens, itemsize) for m in models),
        _heads(models, columns, tile, tokens),
    )


def choose(
    models: list[Model], tokens: int, budget: int | None, windows: int = 8, itemsize: int | None = None
) -> Slices:
    """The fastest slices within the budget, for this number of `windows` of `tokens`.

    itemsize: of the dtype that blocks are computed in, the first model's by default. Raises PlanError that names the
    smallest budget that would do.
    """
    room = ceil((budget if budget is not None else max(ram.available() // 2, 1)) / ram.SLACK) - ram.BASE
    size = models[0].skeleton.dtype.itemsize if itemsize is None else itemsize
    entries = max(vocabulary(m) for m in models)
    distinct = windows * tokens
    fewest = min(entries, 256)
    floor = least(models, tokens, distinct, size)
    if budget is not None and floor > room:
        need = units.readable((floor + ram.BASE) * ram.SLACK, up=True)
        raise PlanError(f"--memory {units.readable(budget)} is too small to evaluate: give --memory {need} or more.")
    batch = max(1, PASS // tokens)
    while batch > 1 and max(_block(m, batch, tokens, size) for m in models) > room:
        batch //= 2
    tile = min(entries, TILE)
    while tile > fewest and _heads(models, tile, tile, tokens) > room:
        tile = max(fewest, tile // 2)
    # Longer slices save nothing but a look at the hidden states, so they end where they would set the peak.
    columns = min(entries, tile * max(1, SLICE // (4 * tile * models[0].skeleton.hidden_size)))
    while columns > tile and _heads(models, columns, tile, tokens) > room:
        columns = tile * max(1, columns // tile // 2)
    return Slices(batch, columns, tile, _bytes(models, batch, columns, tile, tokens, distinct, size))


def least(models: list[Model], tokens: int, distinct: int, itemsize: int) -> int:
    """Bytes, beside ram.BASE, without which these models cannot be measured on `seen` tokens in windows of `tokens`.

    itemsize: of the dtype that blocks are computed in.
    """
    fewest = min(256, *(vocabulary(m) for m in models))
    return _bytes(models, 1, fewest, fewest, tokens, distinct, itemsize)
