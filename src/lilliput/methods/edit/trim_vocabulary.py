"""Tokens that a text never uses leave the embedding, the head and the tokenizer: weights that a domain does not need.

With U the tokens of the text as the tokenizer cuts it, what stays is V' = U, all that merges pass on the way from bytes
to U, the single bytes, and the added and special tokens, filled up with the tokens of the earliest merges until it is
`tokens` and a multiple of `multiple`. Rows V' of the embedding E and of the head stay, E' = E[V'], merges whose parts
and result are in V' stay in their order, and ids are numbered anew, in the tokenizer's files and in the configs. The
text is cut into the same strings as before, its hidden states are what they were, and its logits are those of V':
probabilities are p(v) / sum over V' of p. Other text has tokens too, at worst one for each byte, and is read back as
before. Before a weight is read, the first is checked on the whole text, the second on a sample of many scripts. Later
steps read their text through the smaller tokenizer; so does an evaluation, which measures the original among V' alone.

Paper: Abdaoui et al. 2020, arXiv 2010.05609; Ushio et al. 2023, arXiv 2305.15020.
Cost: the text is tokenized twice while the plan is made. Limits: text unlike the given one takes more tokens, which the
model has seen less of; only BPE over bytes in a tokenizer.json (no SentencePiece); models of text alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from lilliput.anatomy.token_ids import numbering
from lilliput.data.load import used_tokens
from lilliput.errors import PlanError
from lilliput.model.edit import Edit as Decision
from lilliput.target import Strict
from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import EditScores, Sizes, Units, first_of

if TYPE_CHECKING:
    from lilliput.source import Source

# Characters of one to four bytes, some of several code points.
_SAMPLE = "".join(chr(x) for x in range(0x20, 0x250)) + "\t\n中文 ελληνικά русский עברית हिन्दी 한국어 🙂 👩‍👩‍👧 𝔘"


class Options(Strict):
    """See the module's docstring."""

    text: str | None = Field(
        None,
        description="the text whose tokens stay: a .txt or .jsonl file, or what --data takes; none: that of --data",
        json_schema_extra={"names": "text"},
    )
    tokens: int | None = Field(None, ge=1, description="how many tokens stay at least")
    multiple: int = Field(64, ge=1, description="the number of tokens that stay is a multiple of this")


def vocabulary(source: Source, data: str, o: Options) -> tuple[int, ...]:
    """Ids of the tokens that stay, ascending; all rows of the embedding where every token does. Raises PlanError."""
    text = data if o.text is None else o.text
    if text == "self":
        raise PlanError(
            "trim-vocabulary keeps the tokens of a text, and --data self is written later: give it a `text`"
        )
    rows = int(source.text_config.vocab_size)
    tokenizer = source.tokenizer()
    pairs = source.byte_pairs()
    beyond = [x for x in sorted({*pairs.ids(), *tokenizer.get_vocab().values()}) if x >= rows]
    if beyond:
        raise PlanError(
            f"{source.model} has the token {tokenizer.convert_ids_to_tokens(beyond[0])!r} with the id {beyond[0]}, and "
            f"its embedding {rows} rows: resize the model's embedding for its tokenizer and save it again"
        )
    used = used_tokens(text, tokenizer)
    named = source.named_ids() & pairs.ids()
    needed = pairs.needed({*used, *named, *tokenizer.all_special_ids})
    most = max(len(needed), o.tokens or 0)
    kept = sorted(pairs.filled(needed, -(-most // o.multiple) * o.multiple))
    if set(kept) == pairs.ids():
        return tuple(range(rows))
    _check(source, text, tokenizer, used, kept)
    return tuple(kept)


def _check(source: Source, text: str, tokenizer: Any, used: Sequence[int], kept: Sequence[int]) -> None:
    """Raises PlanError unless the smaller tokenizer cuts the text as before and reads back what it was given."""
    smaller, number = source.trimmed(kept).tokenizer(), numbering(kept)
    words = {token: number[old] for token, old in tokenizer.get_vocab().items() if old in number}
    cut = smaller.get_vocab() == words and used_tokens(text, smaller) == [number[x] for x in used]
    if not cut or _read_back(smaller) != _read_back(tokenizer):
        raise PlanError(
            f"the tokenizer of {source.model}, {type(tokenizer).__name__}, does more than its tokenizer.json says, and "
            "with fewer tokens would treat text otherwise: leave trim-vocabulary out"
        )


def _read_back(tokenizer: Any) -> str:
    ids = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text


def sizes(units: Sequence[Units], o: Options) -> Sizes:
    """All blocks stay as they are."""
    return Sizes(len(units))


def run(scores: Sequence[EditScores], units: Sequence[Units], sizes: Sizes, o: Options) -> Decision:
    """Every block, whole."""
    return first_of(units, sizes)


METHOD = Edit(
    paper="Abdaoui et al. 2020, arXiv 2010.05609; Ushio et al. 2023, arXiv 2305.15020",
    options=Options,
    needs=(),
    covers={"trim-vocabulary": [{"method": "trim-vocabulary"}]},
    sizes=sizes,
    run=run,
    vocabulary=vocabulary,
)
