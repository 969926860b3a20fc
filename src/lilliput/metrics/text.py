"""All metrics of one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lilliput.data import Tokens
from lilliput.metrics.agreement import agreement
from lilliput.metrics.flips import flips
from lilliput.metrics.interval import Interval
from lilliput.metrics.kl import kl
from lilliput.metrics.logits import Scores
from lilliput.metrics.perplexity import perplexity
from lilliput.metrics.perplexity_ratio import perplexity_ratio
from lilliput.metrics.tail import kl_quantile
from lilliput.metrics.token_classes import ClassResult, by_class, by_position, classify, worst

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextResult:
    """Metrics of one text; those against a reference are None where there was none.

    data: its source; fingerprint: of the token windows; windows, tokens, stride: how it was cut.
    """

    data: str
    fingerprint: str
    windows: int
    tokens: int
    stride: int
    perplexity: Interval
    reference_perplexity: Interval | None = None
    perplexity_ratio: Interval | None = None
    kl: Interval | None = None
    kl_p95: Interval | None = None
    kl_p99: Interval | None = None
    agreement: Interval | None = None
    flips: Interval | None = None
    classes: tuple[ClassResult, ...] = ()
    positions: tuple[dict[str, Any], ...] = ()
    worst: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data: each metric as {value, low, high}, or null."""
        out: dict[str, Any] = dict(vars(self))
        for key, value in out.items():
            if isinstance(value, Interval):
                out[key] = value.to_json()
        out["classes"] = [x.to_json() for x in self.classes]
        out["positions"], out["worst"] = list(self.positions), list(self.worst)
        return out


def result(text: Tokens, scores: Scores, stride: int, tokenizer: PreTrainedTokenizerBase | None) -> TextResult:
    """From the scores of `text`, of its last positions where the windows overlap.

    A tokenizer asks for token classes, positions and worst tokens, which need a reference.
    """
    windows, tokens = text.ids.shape
    figures: dict[str, Any] = {}
    if (
        scores.reference is not None
        and scores.reference_choice is not None
        and scores.divergence is not None
        and scores.same is not None
    ):
        targets = text.ids[:, tokens - scores.nll.shape[1] :]
        figures = {
            "reference_perplexity": perplexity(scores.reference),
            "perplexity_ratio": perplexity_ratio(scores.nll, scores.reference),
            "kl": kl(scores.divergence),
            "kl_p95": kl_quantile(scores.divergence, 0.95),
            "kl_p99": kl_quantile(scores.divergence, 0.99),
            "agreement": agreement(scores.same),
            "flips": flips(scores.choice == targets, scores.reference_choice == targets),
        }
        if tokenizer is not None:
            figures |= _detail(text.ids, scores, tokenizer)
    return TextResult(text.source, text.fingerprint, windows, tokens, stride, perplexity(scores.nll), **figures)


def _detail(ids: Tensor, scores: Scores, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    if scores.divergence is None or scores.same is None or scores.reference_choice is None:
        raise ValueError("token classes need a reference")
    first = ids.shape[1] - scores.nll.shape[1] - 1  # the position that predicts the first scored token
    texts = _texts(tokenizer, ids)
    masks = {name: mask[:, first + 1 :] for name, mask in classify(texts).items()}
    at_fault = worst(
        [row[first:] for row in texts],
        scores.divergence,
        _texts(tokenizer, scores.choice),
        _texts(tokenizer, scores.reference_choice),
    )
    return {
        "classes": tuple(by_class(masks, scores.divergence, scores.same)),
        "positions": tuple(by_position(scores.divergence)),
        "worst": tuple(at_fault),
    }


def _texts(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> Sequence[Sequence[str]]:
    """Every token as text, decoded by itself; ids int64 [windows, tokens]."""
    by_id = {i: tokenizer.decode([i]) for i in torch.unique(ids).tolist()}
    return [[by_id[i] for i in row] for row in ids.tolist()]
