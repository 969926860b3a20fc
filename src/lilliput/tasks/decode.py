"""Greedy decoding of many prompts with stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lilliput.data.tokens import check_ids
from lilliput.errors import DataError
from lilliput.tasks.likelihood import Loaded, ids_of, not_finite, tail_logits

BATCH = 8


def _ends(loaded: Loaded) -> list[int]:
    """Token ids that end a text: those of the generation config, or the tokenizer's."""
    ids: Any = getattr(loaded.model.generation_config, "eos_token_id", None)
    if ids is None:
        ids = loaded.tokenizer.eos_token_id
    return [] if ids is None else [int(x) for x in (ids if isinstance(ids, list) else [ids])]


def _text(loaded: Loaded, ids: Sequence[int], ends: Sequence[int], stop: Sequence[str]) -> tuple[str, bool]:
    """The continuation up to the first end or stop string, and whether there was one."""
    end = next((i for i, x in enumerate(ids) if x in ends), len(ids))
    text = str(loaded.tokenizer.decode(list(ids[:end]), skip_special_tokens=True))
    at = min((i for i in (text.find(x) for x in stop) if i >= 0), default=-1)
    return (text[:at], True) if at >= 0 else (text, end < len(ids))


def _batch(loaded: Loaded, prompts: Sequence[list[int]], stop: Sequence[str], tokens: int) -> list[str]:
    from transformers import GenerationConfig

    model: Any = loaded.model
    ends = _ends(loaded)
    longest = max(map(len, prompts))
    # Padding at the left, where the mask hides it, so that all rows write at the same position.
    ids = torch.tensor([[0] * (longest - len(x)) + x for x in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in prompts], device=model.device)

    def finished(input_ids: Tensor, scores: Any, **other: Any) -> Tensor:
        rows = input_ids[:, longest:].tolist()
        return torch.tensor([_text(loaded, row, ends, stop)[1] for row in rows], device=input_ids.device)

    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=tokens,
        pad_token_id=ends[0] if ends else 0,
        eos_token_id=ends or None,
        use_cache=True,
    )
    out = model.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=[finished])
    return [_text(loaded, row, ends, stop)[0] for row in out[:, longest:].tolist()]


@torch.no_grad()
def greedy(
    loaded: Loaded,
    prompts: Sequence[str],
    *,
    stop: Sequence[str] = (),
    tokens: int = 64,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Greedy continuations of at most `tokens` tokens, in the order of the prompts, without stop strings.

    Prompts that leave no room for the answer lose tokens at their left. Prompts of similar length share a batch.
    step(done, total) counts prompts. Raises DataError where the model's context is no longer than `tokens` or a prompt
    is empty or holds a token beyond the embedding, SourceError where logits are not finite on the longest prompt.
    """
    if tokens >= loaded.length:
        raise DataError(f"answers of {tokens} tokens leave no room in the {loaded.length} positions of {loaded.name}.")
    texts: dict[int, str] = {}
    waiting: list[int] = []
    encoded = [ids_of(loaded.tokenizer, x)[-(loaded.length - tokens) :] for x in prompts]
    for i, prompt in enumerate(prompts):
        if not encoded[i]:
            raise DataError("a prompt is empty: give the model something to continue.")
        check_ids(encoded[i], loaded.tokenizer, loaded.vocabulary, "a prompt of the task")
        before = loaded.answers.get("greedy", prompt, list(stop), tokens)
        if before is None:
            waiting.append(i)
        else:
            texts[i] = str(before)
    waiting.sort(key=lambda i: (-len(encoded[i]), i))
    step(len(texts), len(prompts))
    for at in range(0, len(waiting), BATCH):
        batch = waiting[at : at + BATCH]
        longest = tuple(encoded[batch[0]])
        if at == 0 and not bool(torch.isfinite(tail_logits(loaded, [longest], len(longest) - 1)).all()):
            raise not_finite(loaded, torch.tensor([longest], device=loaded.model.device))
        answers = _batch(loaded, [encoded[i] for i in batch], stop, tokens)
        for i, answer in zip(batch, answers, strict=True):
            texts[i] = answer
            loaded.answers.put(answer, "greedy", prompts[i], list(stop), tokens)
        step(len(texts), len(prompts))
    return [texts[i] for i in range(len(prompts))]
