"""Text that a student writes while it is trained, alone or together with its teacher; no gradient passes through it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lilliput.algebra.divergences import mixed
from lilliput.errors import LilliputError
from lilliput.runtime.cache import CachedModel
from lilliput.training.beside import Beside, judged
from lilliput.training.student import Student
from lilliput.verbs.objective import RolloutIO


class Writer:
    """ends: tokens that end a text; vocabulary: tokens that the tokenizer knows, no others are written."""

    def __init__(self, student: Student, teacher: Beside, ends: Sequence[int], vocabulary: int) -> None:
        self._student, self._teacher = student, teacher
        self._ends, self._vocabulary = tuple(ends), vocabulary

    def io(self, ids: Tensor, counts: Tensor) -> RolloutIO:
        """What an objective finds for a step whose lessons are ids, counts [B, T]."""

        def write(share: float, temperature: float, prompt: int) -> tuple[Tensor, Tensor]:
            return self.write(ids, counts, share, temperature, prompt)

        return RolloutIO(ids, counts, write, self.judge)

    @torch.no_grad()
    def judge(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """See `RolloutIO`."""
        with self._student.still():
            own = judged(self._student.skeleton, ids)
        return own.cpu(), self._teacher.judge(ids).cpu()

    @torch.no_grad()
    def write(
        self, ids: Tensor, counts: Tensor, share: float, temperature: float, prompt: int
    ) -> tuple[Tensor, Tensor]:
        """See `RolloutIO`; draws come from torch's own generator. Raises LilliputError for logits that are no numbers,
        and for prompts that leave no room."""
        length = ids.shape[1]
        starts = beginnings(counts, prompt)
        if int(starts.min()) >= length:
            raise LilliputError(
                f"prompts of {int(starts.min())} tokens leave nothing to write in samples of {length}: give a shorter "
                "`prompt`, or longer `tokens`"
            )
        out, written = ids.clone(), torch.zeros_like(counts)
        with self._student.still():
            for start in sorted({int(x) for x in starts}):
                rows = (starts == start).nonzero()[:, 0]
                if start < length:
                    out[rows], written[rows] = self._continue(ids[rows, :start], length, share, temperature)
        return out, written

    def _continue(self, prompts: Tensor, length: int, share: float, temperature: float) -> tuple[Tensor, Tensor]:
        begun = prompts.shape[1]
        models = [(self._student.skeleton, share < 1), (self._teacher.model.skeleton, share > 0)]
        readers = [CachedModel(x.model) if asked else None for x, asked in models]
        ids = torch.full((len(prompts), length), self._ends[0] if self._ends else 0)
        counts = torch.zeros(len(prompts), length, dtype=torch.bool)
        ids[:, :begun] = prompts
        going = torch.ones(len(prompts), dtype=torch.bool)
        for at in range(begun, length):
            latest = ids[:, :begun] if at == begun else ids[:, at - 1 : at]
            own, other = (
                None if x is None else self._next(x, latest, at == begun, temperature, str(models[n][0].device))
                for n, x in enumerate(readers)
            )
            log_p = other if own is None else own if other is None else mixed(other, own, share)
            if log_p is None or not bool(log_p.exp().sum(-1).isfinite().all()):
                raise LilliputError(f"what the student should write is no number at token {at}: lower lr")
            drawn = torch.multinomial(log_p.exp(), 1)[:, 0]
            ids[going, at] = drawn[going]
            counts[:, at] = going
            for end in self._ends:
                going &= drawn != end
            if not bool(going.any()):
                break
        return ids, counts

    def _next(self, reader: CachedModel, ids: Tensor, first: bool, temperature: float, device: str) -> Tensor:
        """Log-probabilities float32 [B, vocabulary] of the token after `ids`."""
        known = inspect.signature(reader.model.forward).parameters
        options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        read = reader.start if first else reader.step
        logits: Tensor = read(ids.to(device), **options).logits[:, -1, : self._vocabulary]
        return (logits.float() / temperature).log_softmax(-1).cpu()


def beginnings(counts: Tensor, prompt: int) -> Tensor:
    """Tokens of each row, of counts bool [B, T], that are given: those that do not count, or `prompt` where all do."""
    first = torch.where(counts.any(1), counts.int().argmax(1), counts.shape[1])
    return torch.where(first > 1, first, prompt)


def ends(config: Any) -> tuple[int, ...]:
    """Tokens that end a text, by the model's config."""
    found = getattr(config, "eos_token_id", None)
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)
