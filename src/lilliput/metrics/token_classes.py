"""Which kinds of tokens suffer: the divergence by token class and by position in the context.

A token belongs to every class whose rule it meets, by the text of the word that it is part of:

- numbers: the word holds a digit;
- names: the word begins with a capital, is not the first of its sentence, and is longer than one letter;
- code: the word holds a character or pair that prose does not: one of { } [ ] ( ) < > = _ / \\ ; # $ | ~ ^ or ::, ->;
- rare words: the word occurs once in the whole evaluated text;
- other words: none of these.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lilliput.metrics.interval import Interval, clip, mean_interval
from lilliput.metrics.metric import Metric

CLASSES = ("numbers", "names", "code", "rare words", "other words")
_CODE = re.compile(r"[{}\[\]()<>=_/\\;#$|~^]|::|->")
_MARKUP = re.compile(r"^(<unk>|@[-,.]@)$")  # WikiText's own marks are no code
_STOPS = (".", "!", "?", "\n", ":")


@dataclass(frozen=True)
class ClassResult:
    """A class of tokens: how many, and what happened to them. kl in nats per token; None for a class in one window."""

    name: str
    tokens: int
    kl: Interval | None
    agreement: Interval | None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "tokens": self.tokens,
            "kl": self.kl and self.kl.to_json(),
            "agreement": self.agreement and self.agreement.to_json(),
        }


def words_of(pieces: Sequence[str]) -> tuple[list[int], list[str]]:
    """From a window's tokens as text: the number of the word that each belongs to, and the words.

    A word begins after white space: at a token that starts with it or follows one that ends with it.
    """
    number, words = [], [""]
    for piece in pieces:
        starts = piece[:1].isspace() or words[-1][-1:].isspace() or not words[-1]
        if starts and words[-1]:
            words.append("")
        words[-1] += piece
        number.append(len(words) - 1)
    return number, words


def classify(windows: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """By class, whether each token of each window is of it: bool [windows, tokens]; `windows`: tokens as text."""
    split = [words_of(window) for window in windows]
    counts = Counter(word.strip() for _, words in split for word in words)
    masks = {name: torch.zeros(len(windows), len(windows[0]), dtype=torch.bool) for name in CLASSES}
    for row, (number, words) in enumerate(split):
        classes = [_classes(word.strip(), words[i - 1] if i else "\n", counts) for i, word in enumerate(words)]
        for column, word in enumerate(number):
            for name in classes[word]:
                masks[name][row, column] = True
    return masks


def _classes(word: str, before: str, counts: Counter[str]) -> list[str]:
    out = []
    if any(c.isdigit() for c in word):
        out.append("numbers")
    core = word.strip("\"'`.,()")
    if len(core) > 1 and core[0].isupper() and not before.rstrip(" ").endswith(_STOPS):
        out.append("names")
    if _CODE.search(word) and not _MARKUP.match(word):
        out.append("code")
    if word and counts[word] == 1:
        out.append("rare words")
    return out or ["other words"]


def by_class(masks: dict[str, Tensor], divergence: Tensor, same: Tensor) -> list[ClassResult]:
    """Divergence and agreement of every class; masks are of the predicted tokens, all [windows, scored tokens]."""
    out = []
    for name, mask in masks.items():
        kl = _mean(divergence, mask)
        agreement = _mean(same.double(), mask)
        out.append(
            ClassResult(
                name,
                int(mask.sum()),
                kl and clip(kl, 0.0, float("inf")),
                agreement and clip(agreement, 0.0, 1.0),
            )
        )
    return out


def _mean(values: Tensor, mask: Tensor) -> Interval | None:
    """Mean over the masked positions, its interval by the linearised ratio over windows; None for fewer than two."""
    counts = mask.sum(1).double()
    some = counts > 0
    if int(some.sum()) < 2:
        return None
    sums = (values.double() * mask).sum(1)[some]
    counts = counts[some]
    ratio = float(sums.sum() / counts.sum())
    # Residuals of the ratio estimator, scaled so that their mean's spread is the ratio's.
    return mean_interval(ratio + (sums - ratio * counts) / counts.mean())


def by_position(divergence: Tensor, bins: int = 8) -> list[dict[str, Any]]:
    """Divergence over equal stretches of the window: rows {from, to, kl}, positions from 1, `to` not included."""
    length = divergence.shape[1]
    edges = [round(length * i / bins) for i in range(bins + 1)]
    return [
        {"from": a + 1, "to": b + 1, "kl": clip(mean_interval(divergence[:, a:b].mean(1)), 0.0, float("inf")).to_json()}
        for a, b in itertools.pairwise(edges)
        if b > a
    ]


def worst(
    windows: Sequence[Sequence[str]],
    divergence: Tensor,
    choice: Sequence[Sequence[str]],
    reference: Sequence[Sequence[str]],
    count: int = 12,
    context: int = 24,
) -> list[dict[str, Any]]:
    """The positions of largest divergence: {text, token, ours, theirs, kl}, at most two of one window.

    windows: all tokens as text; divergence [windows, tokens - 1]; choice, reference: what both models preferred there.
    """
    out: list[dict[str, Any]] = []
    per_window: Counter[int] = Counter()
    width = divergence.shape[1]
    for flat in divergence.reshape(-1).argsort(descending=True, stable=True).tolist():
        row, at = divmod(flat, width)
        if per_window[row] == 2:
            continue
        per_window[row] += 1
        out.append(
            {
                "text": "".join(windows[row][max(0, at + 1 - context) : at + 1]),
                "token": windows[row][at + 1],
                "ours": choice[row][at],
                "theirs": reference[row][at],
                "kl": float(divergence[row, at]),
            }
        )
        if len(out) == count:
            break
    return out


METRIC = Metric(
    how="lilliput eval DIR --against MODEL",
    key="quality.classes, quality.positions, quality.worst",
    unit="nats per token and shares",
    interval="Student's t over windows",
)
