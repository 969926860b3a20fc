"""Generation divergence: after how many tokens greedy continuations of both models part.

Perplexity scores every token after the true ones before it; in use a model follows its own. Two models that agree on
95 % of the next tokens part after some 20 of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lilliput.data import load_tokens
from lilliput.data.tokens import same_vocabulary, vocabulary_of
from lilliput.errors import DataError
from lilliput.machine import memory as ram
from lilliput.metrics.interval import Interval, clip, mean_interval
from lilliput.metrics.metric import Metric
from lilliput.model.stored import Model, open_model

CONTEXT = 32  # tokens of a prompt
NEW = 64  # of a continuation


@dataclass(frozen=True)
class GenerationResult:
    """prompts: how many; new_tokens: length of each continuation; first_difference: tokens before the continuations
    part (new_tokens where they never do), mean and interval over prompts; identical: share that never part; examples:
    {prompt, ours, theirs, first_difference}, the earliest partings first."""

    prompts: int
    new_tokens: int
    first_difference: Interval
    identical: Interval
    examples: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "new_tokens": self.new_tokens,
            "first_difference": self.first_difference.to_json(),
            "identical": self.identical.to_json(),
            "examples": list(self.examples),
        }


def first_differences(ours: Tensor, theirs: Tensor) -> Tensor:
    """Tokens before the first difference, int64 [prompts], from continuations int64 [prompts, new]; new for none."""
    differs = ours != theirs
    first = differs.int().argmax(dim=1)
    return torch.where(differs.any(dim=1), first, ours.shape[1])


def continuations(model: Model, prompts: Tensor, new_tokens: int) -> Tensor:
    """Greedy continuations int64 [prompts, new_tokens] of prompts int64 [prompts, tokens]; the whole model is loaded.

    Generation goes on past an end-of-text token, so that all continuations have one length.
    """
    model.load(model.skeleton.shapes)
    try:
        whole: Any = model.skeleton.model
        ids = prompts.to(model.skeleton.device)
        with torch.no_grad():
            out = whole.eval().generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                pad_token_id=0,
            )
    finally:
        model.unload(model.skeleton.shapes)
        ram.trim()
    tokens: Tensor = out[:, ids.shape[1] :].cpu()
    return tokens


def generation(
    model: str | Path | Model,
    against: str | Path | Model,
    *,
    data: str | Path = "docs:library",
    prompts: int = 16,
    new_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    examples: int = 4,
) -> GenerationResult:
    """Continue the first 32 tokens of `prompts` consecutive stretches of `data` with both models, one after the other.

    new_tokens: 64 unless given. Models that know fewer positions get shorter prompts and answers. The whole of one
    model is in memory at a time; one that is open already keeps its dtype and device. Raises DataError for too little
    text, fewer than two prompts, answers that the models have no positions for, or models of different tokens.
    """
    models = [open_model(x, dtype=dtype, device=device) for x in (model, against)]
    tokenizer = models[0].source.tokenizer()
    if models[0].vocabulary != models[1].vocabulary:
        theirs = vocabulary_of(models[1].source.tokenizer())
        same_vocabulary(vocabulary_of(tokenizer), theirs, f"'{models[0].source.model}' and '{models[1].source.model}'")
    limits = [x.positions for x in models if x.positions is not None]
    room = min(limits, default=CONTEXT + max(NEW, new_tokens or 0))
    context = min(CONTEXT, max(1, room // 3))
    new_tokens = min(NEW, room - context) if new_tokens is None else new_tokens
    if prompts < 2 or not 1 <= new_tokens <= room - context:
        raise DataError(
            f"{prompts} prompts of {context} tokens, each with {new_tokens} new ones: give 2 prompts or more, and "
            f"at most {room - context} new tokens for models that know {room} positions."
        )
    stretches = load_tokens(data, tokenizer, samples=prompts, tokens=2 * CONTEXT, vocabulary=models[0].vocabulary)
    ids = stretches.ids[:, :context]
    answers = [continuations(x, ids, new_tokens) for x in models]
    first = first_differences(answers[0], answers[1])
    order = first.argsort(stable=True).tolist()[:examples]
    return GenerationResult(
        prompts=prompts,
        new_tokens=new_tokens,
        first_difference=clip(mean_interval(first.double()), 0.0, float(new_tokens)),
        identical=clip(mean_interval((first == new_tokens).double()), 0.0, 1.0),
        examples=tuple(_example(tokenizer, ids[i], answers[0][i], answers[1][i], int(first[i])) for i in order),
    )


def _example(tokenizer: Any, prompt: Tensor, ours: Tensor, theirs: Tensor, first: int) -> dict[str, Any]:
    texts: Sequence[str] = [tokenizer.decode(x.tolist()) for x in (prompt, ours, theirs)]
    return {"prompt": texts[0], "ours": texts[1], "theirs": texts[2], "first_difference": first}


METRIC = Metric(
    how="lilliput eval DIR --against MODEL --prompts 16",
    key="quality.generation",
    unit="tokens, and share of prompts",
    interval="Student's t over prompts",
)
