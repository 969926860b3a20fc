"""The model writes its own calibration text: no data needed (after LLM-QAT, Liu et al. 2023, arXiv:2305.17888)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lilliput.data.tokens import Tokens, check_ids
from lilliput.errors import DataError
from lilliput.runtime.cache import CachedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lilliput.model.stored import Model

BATCH = 32


def _first(tokenizer: PreTrainedTokenizerBase, vocabulary: int, draws: Tensor) -> Tensor:
    """First tokens [n] from uniform draws [n]: the beginning-of-text token, or any ordinary one where there is none."""
    if tokenizer.bos_token_id is not None:
        return torch.full(draws.shape, int(tokenizer.bos_token_id))
    return _ordinary(tokenizer, vocabulary, draws)


def _ordinary(tokenizer: PreTrainedTokenizerBase, vocabulary: int, draws: Tensor) -> Tensor:
    """Ordinary tokens [n] from uniform draws [n]."""
    ordinary = torch.ones(vocabulary, dtype=torch.bool)
    ordinary[[x for x in tokenizer.all_special_ids if x < vocabulary]] = False
    ids = ordinary.nonzero()[:, 0]
    return ids[(draws * len(ids)).long()]


def _sample(logits: Tensor, draws: Tensor, temperature: float) -> Tensor:
    """Ids [n] from logits [n, V] and uniform draws [n] in [0, 1), by inverting the cumulative distribution."""
    reach = torch.softmax(logits.double() / temperature, dim=-1).cumsum(dim=-1)
    # Relative to the actual end of the sum, which rounding leaves a little off 1.
    picked = torch.searchsorted(reach, (draws * reach[:, -1])[:, None], right=True)[:, 0]
    return picked.clamp_max(logits.shape[-1] - 1)


@torch.no_grad()
def generate_tokens(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    tokens: int,
    seed: int = 0,
    *,
    temperature: float = 1.0,
    batch: int = BATCH,
    greedy: tuple[int, int] | None = None,
) -> Tokens:
    """Text that the model writes, int64 [samples, tokens], as calibration windows.

    Each sample begins with the beginning-of-text token (a random ordinary token where the model has none) and is drawn
    token by token from the model's own distribution. After an end-of-text token the model goes on with what it thinks
    comes next: no padding. With `greedy` a random ordinary token comes first (behind that of the beginning), then as
    many of the likeliest as each sample draws between the two numbers, and only then what is sampled, as LLM-QAT writes
    its text. The draws of a sample depend on the seed and its number only; the ids also on the logits,
    so another batch size or thread count may change them by rounding.

    All blocks are loaded at once, with a cache of keys and values for `batch` samples, and unloaded at the end.
    Raises DataError when the logits are not finite, SourceError for a model that cannot go on from what it has read.
    """
    if samples < 1 or tokens < 1:
        raise DataError(f"{samples} samples of {tokens} tokens: both must be at least 1.")
    if temperature <= 0:
        raise DataError(f"temperature {temperature}: it must be above 0.")
    if greedy is not None and not 0 <= greedy[0] <= greedy[1]:
        raise DataError(f"from {greedy[0]} to {greedy[1]} likeliest tokens: give two numbers that rise from 0 on.")
    skeleton = model.skeleton
    names = tuple(skeleton.shapes)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(samples, tokens, generator=generator, dtype=torch.float64)
    # Models pad their vocabulary; what the tokenizer does not know must not be written.
    vocabulary = min(len(tokenizer), model.vocabulary)
    ids = torch.empty(samples, tokens, dtype=torch.int64)
    writer = CachedModel(skeleton.model)
    opened, ends = 0, torch.zeros(samples, dtype=torch.int64)  # the text's own first token, and its last greedy one
    if greedy is not None:
        opened = 0 if tokenizer.bos_token_id is None or tokens == 1 else 1
        wide = torch.rand(samples, generator=generator, dtype=torch.float64) * (greedy[1] - greedy[0] + 1)
        ends = opened + greedy[0] + wide.long()
    if tokenizer.bos_token_id is not None:
        check_ids([int(tokenizer.bos_token_id)], tokenizer, model.vocabulary, "'self'")
    model.load(names)
    try:
        for start in range(0, samples, batch):
            stop = min(samples, start + batch)
            ids[start:stop, 0] = _first(tokenizer, vocabulary, draws[start:stop, 0])
            for at in range(1, tokens):
                last = ids[start:stop, at - 1 : at].to(skeleton.device)
                out = writer.step(last) if at > 1 else writer.start(last)
                logits = out.logits[:, -1, :vocabulary].cpu()
                if not bool(torch.isfinite(logits.sum(dim=-1)).all()):
                    raise DataError(f"the model's logits are not finite at token {at}: it cannot write its own text.")
                some = draws[start:stop, at]
                if at == opened:
                    ids[start:stop, at] = _ordinary(tokenizer, vocabulary, some)
                    continue
                sampled = _sample(logits, some, temperature)
                ids[start:stop, at] = torch.where(at <= ends[start:stop], logits.argmax(-1), sampled)
    finally:
        model.unload(names)
    return Tokens.of(ids, "self")
