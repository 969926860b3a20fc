"""Log-likelihoods of continuations by a model in memory, as EleutherAI's lm-evaluation-harness defines them.

Context and continuation are encoded together and cut after as many tokens as the context has by itself, spaces at the
end of the context first being moved to the continuation. An empty context is the beginning-of-text token (or
end-of-text where there is none). What exceeds the model's context is cut off at the left.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lilliput.anatomy.skeleton import positions
from lilliput.data.tokens import check_ids
from lilliput.errors import DataError, SourceError
from lilliput.runtime import caches
from lilliput.tasks.answers import AnswerStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS = 2048  # of a batch, padding included
LOGITS = 1 << 26  # of a batch; 256 MiB in float32
FALLBACK_LENGTH = 2048


@dataclass(frozen=True)
class Loaded:
    """A model in memory with its tokenizer. name: for messages; length: the most tokens it reads; answers: those that
    it gave."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    length: int
    answers: AnswerStore = field(default_factory=AnswerStore)

    @property
    def vocabulary(self) -> int:
        """Rows of the token embedding."""
        table: Any = self.model.get_input_embeddings()
        return int(table.weight.shape[0])


@dataclass(frozen=True)
class Score:
    """value: log-likelihood of a continuation in nats; greedy: whether each of its tokens is the model's first
    choice."""

    value: float
    greedy: bool


@dataclass(frozen=True)
class Encoded:
    """inputs: token ids that the model reads; targets: those that the last len(targets) inputs are to predict."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


def context_length(model: PreTrainedModel) -> int:
    """Positions that the model's config knows; 2048 where it names none."""
    return positions(model.config.get_text_config()) or FALLBACK_LENGTH


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Token ids, with the tokenizer's own special tokens unless the text begins with its beginning-of-text token."""
    start = tokenizer.bos_token
    added = special and not (start and text.startswith(start))
    ids: list[int] = tokenizer(text, add_special_tokens=added, verbose=False)["input_ids"]
    return ids


def encode(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, length: int) -> Encoded:
    """Token ids of a request, cut to `length` inputs. Raises DataError for a continuation without tokens of its own or
    longer than `length`."""
    if context:
        stem = context.rstrip()
        # A context of spaces alone stays as it is: nothing would be left of it.
        spaces = context[len(stem) :] if stem else ""
        before = ids_of(tokenizer, stem or context)
        after = ids_of(tokenizer, (stem or context) + spaces + continuation)[len(before) :]
    else:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        after = ids_of(tokenizer, continuation, special=False)
        if start is None:
            raise DataError("an item has no context, and the tokenizer has no token that begins or ends a text.")
        before = [start]
        if after[:1] == [start]:
            after = after[1:]
    if not after or not before:
        raise DataError(f"the continuation {continuation!r} has no token of its own after {context[-40:]!r}.")
    if len(after) > length:
        raise DataError(
            f"a continuation of {len(after)} tokens is longer than the model's {length} positions: shorten it."
        )
    whole = (before + after)[-(length + 1) :]
    return Encoded(tuple(whole[:-1]), tuple(after))


def _batches(rows: Sequence[tuple[tuple[int, ...], int]], vocabulary: int) -> Iterator[list[int]]:
    """Indices of rows (inputs, positions needed at their end), longest first, as many as the limits allow."""
    batch: list[int] = []
    first = 0
    for i in sorted(range(len(rows)), key=lambda i: (-len(rows[i][0]), rows[i][0])):
        inputs, needed = rows[i]
        first = min(first, len(inputs) - needed) if batch else len(inputs) - needed
        longest = len(rows[batch[0]][0]) if batch else len(inputs)
        count = len(batch) + 1
        if batch and (count * longest > TOKENS or count * (longest - first) * vocabulary > LOGITS):
            yield batch
            batch, first = [], len(inputs) - needed
        batch.append(i)
    if batch:
        yield batch


def tail_logits(loaded: Loaded, inputs: Sequence[tuple[int, ...]], first: int) -> Tensor:
    """Logits [rows, longest - first, vocabulary] at the positions from `first` on; rows are padded at the right, where
    causal attention does not look."""
    model: Any = loaded.model
    cached = caches.of(model) is not None  # a compressed cache shows only where it is used
    longest = max(map(len, inputs))
    # Padding repeats the first token: an id that every tokenizer has, and no padding token to be warned about.
    ids = torch.tensor([[*x, *(x[:1] * (longest - len(x)))] for x in inputs], device=model.device)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        keep = torch.arange(first, longest, device=model.device)
        logits: Tensor = model(input_ids=ids, logits_to_keep=keep, use_cache=cached).logits
        return logits
    whole: Tensor = model(input_ids=ids, use_cache=cached).logits
    return whole[:, first:]


def broken(loaded: Loaded, inputs: Tensor) -> str:
    """Name of the first module whose output on inputs [rows, tokens] is not finite; empty where all are."""
    names: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: Any, arguments: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if not names and isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
                names.append(name)

        return look

    model: Any = loaded.model
    cached = caches.of(model) is not None
    handles = [x.register_forward_hook(hook(name)) for name, x in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(input_ids=inputs, use_cache=cached)
    finally:
        for handle in handles:
            handle.remove()
    return names[0] if names else ""


def not_finite(loaded: Loaded, inputs: Tensor) -> SourceError:
    """The error to raise where logits on inputs [rows, tokens] are not finite; runs the model once more to say where
    they first are not."""
    where = broken(loaded, inputs) or "the head"
    return SourceError(
        f"{loaded.name}: logits are not finite; {where} is the first module whose output is not. The weights are "
        "damaged or overflow in this dtype: run `lilliput verify`, or evaluate with --dtype float32."
    )


def _score(logits: Tensor, targets: Tensor) -> Score:
    """Score of targets [k] under logits [k, vocabulary]."""
    logs = torch.log_softmax(logits.float(), dim=-1)
    value = float(logs.gather(-1, targets[:, None]).sum())
    return Score(value, bool((logs.argmax(dim=-1) == targets).all()))


@torch.no_grad()
def scores(
    loaded: Loaded, requests: Sequence[Encoded], *, step: Callable[[int, int], None] = lambda done, total: None
) -> list[Score]:
    """Scores of encoded requests, in their order. Log-softmax and sums in float32.

    Requests that differ in their last token only (yes or no, A to E) share a forward pass. Batches go from long to
    short, and the head is applied where a continuation is predicted. step(done, total) counts requests. Raises
    SourceError where logits are not finite, naming the module where that begins, DataError for a token beyond the
    embedding.
    """
    highest = max((x.inputs + x.targets for x in requests), key=max, default=())
    check_ids(highest, loaded.tokenizer, loaded.vocabulary, "an item of the task")
    by_index: dict[int, Score] = {}
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, x in enumerate(requests):
        before = loaded.answers.get("likelihood", x.inputs, x.targets)
        if before is None:
            groups.setdefault(x.inputs, []).append(i)
        else:
            by_index[i] = Score(float(before[0]), bool(before[1]))
    rows = [(inputs, max(len(requests[i].targets) for i in group)) for inputs, group in groups.items()]
    step(len(by_index), len(requests))
    for batch in _batches(rows, int(loaded.model.config.get_text_config().vocab_size)):
        first = min(len(rows[j][0]) - rows[j][1] for j in batch)
        logits = tail_logits(loaded, [rows[j][0] for j in batch], first)
        for row, j in enumerate(batch):
            inputs, _ = rows[j]
            for i in groups[inputs]:
                targets = torch.tensor(requests[i].targets, device=logits.device)
                end = len(inputs) - first
                by_index[i] = score = _score(logits[row, end - len(targets) : end], targets)
                if not math.isfinite(score.value):
                    raise not_finite(loaded, torch.tensor([inputs], device=logits.device))
                loaded.answers.put([score.value, score.greedy], "likelihood", inputs, requests[i].targets)
        step(len(by_index), len(requests))
    return [by_index[i] for i in range(len(requests))]


def log_likelihoods(
    loaded: Loaded, requests: Sequence[tuple[str, str]], *, step: Callable[[int, int], None] = lambda done, total: None
) -> list[Score]:
    """Scores of (context, continuation) pairs of text, in their order; see `encode` and `scores`."""
    return scores(loaded, [encode(loaded.tokenizer, a, b, loaded.length) for a, b in requests], step=step)
