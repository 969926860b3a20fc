"""A reference that has more tokens than the model: compared on the tokens that both have.

The model's tokens are some of the reference's. Text is cut by the model's tokenizer, the reference reads the same
strings under its own ids, and predicts among these tokens alone: its probabilities are p(v) / sum p over them. So all
metrics against a reference are defined, and say what happened to the weights that are left; what fewer tokens cost is
the number of them that a text takes, which `cut` tells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lilliput.model.edit import Edit
from lilliput.model.edited import EditedModel
from lilliput.model.weights import Model

if TYPE_CHECKING:
    from lilliput.source import Source


def shared(model: Source, base: Source, rows: tuple[int, int]) -> tuple[int, ...] | None:
    """The reference's ids of the model's tokens, ascending; None where it has no more tokens than the model, or not all
    of them in the same order. rows: of both embeddings."""
    if rows[0] >= rows[1]:
        return None
    ours: dict[str, int] = model.tokenizer().get_vocab()
    theirs: dict[str, int] = base.tokenizer().get_vocab()
    if sorted(ours.values()) != list(range(rows[0])) or not ours.keys() <= theirs.keys():
        return None
    kept = tuple(theirs[token] for token in sorted(ours, key=lambda x: ours[x]))
    return kept if list(kept) == sorted(kept) else None


def fewer(model: Model, base: Model) -> Model:
    """The reference with the model's tokens alone; as it is where `shared` finds none."""
    kept = shared(model.source, base.source, (model.vocabulary, base.vocabulary))
    if kept is None:
        return base
    return EditedModel(base, Edit(tuple(range(len(base.skeleton.block_names))), vocabulary=kept))


def cut(smaller: Model, base: Model, ids: Tensor) -> str:
    """How many more tokens the text of ids int64 [windows, tokens] takes than it took before, in words."""
    tokenizer, before = smaller.source.tokenizer(), base.source.tokenizer()
    texts = [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in ids.tolist()]
    count = sum(len(x) for x in before(texts, add_special_tokens=False, verbose=False)["input_ids"])
    return (
        f"{smaller.vocabulary:,} of the original's {base.vocabulary:,} tokens: the original is measured with these "
        f"alone, and the text takes {ids.numel():,} of them where it took {count:,}"
    )
