"""What a container of integer codes has room for: the same rule for a plan and for a finished folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lilliput.export.convert.coded import plain
from lilliput.export.outcome import Outcome
from lilliput.formats.integer import IntegerFormat

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Room:
    """What one container holds.

    bits: widths of its codes; narrower ones are held in the next. groups: inputs that may share a scale, any number
    where empty; larger groups are held as several that divide them. row: a whole row may be one group. mixed: grids may
    differ from linear to linear. tables: an embedding may be coded; head: a head of its own may. steps: what must
    divide the outputs, and the inputs. models: types of models, any where empty. engines: who reads it.
    """

    name: str
    engines: str
    bits: tuple[int, ...]
    groups: tuple[int, ...] = ()
    row: bool = True
    mixed: bool = True
    tables: bool = False
    head: bool = False
    steps: tuple[int, int] = (1, 1)
    models: tuple[str, ...] = ()

    def refuse(self, outcomes: Sequence[Outcome], config: PretrainedConfig) -> str | None:
        """Why the container cannot hold these linears, and the nearest that it can; None where it can."""
        if self.models and config.model_type not in self.models:
            return f"models of type '{config.model_type}' are not written so; these are: {', '.join(self.models)}"
        expert = next((x for x in outcomes if x.expert), None)
        if expert is not None:
            return f"'{expert.name}' is an expert, which no engine was tried with. Nearest: compressed-tensors"
        coded = [x for x in outcomes if x.scheme.parts and not plain(x.scheme)]
        if not coded:
            return f"none of its linears is quantized: compress it with integers first, such as {self.example}"
        for x in coded:
            reason = self._unfit(x)
            if reason is not None:
                return reason
        sizes = {self.group(x): x for x in coded}
        if not self.mixed and len(sizes) > 1:
            first, second = list(sizes.values())[:2]
            return (
                f"'{first.name}' is {first.scheme.describe()} and '{second.name}' {second.scheme.describe()}, and all "
                f"linears have one size of groups there. Nearest: one target for all linears, or gptq"
            )
        return None

    @property
    def example(self) -> str:
        return f"rtn or gptq with {self.bits[-1] if 4 not in self.bits else 4} bits"

    def code_bits(self, bits: int) -> int:
        """Bits that codes of `bits` bits take in the container."""
        return min(x for x in self.bits if x >= bits)

    def group(self, x: Outcome) -> int:
        """Inputs that share a scale in the container; -1: all of a row. 0: none that the container has will do."""
        form = x.format
        whole = form is None or form.group_size <= 0
        size = x.in_features if form is None or whole else form.group_size
        if whole and self.row:
            return -1
        return max((g for g in self.groups if size % g == 0), default=0) if self.groups else size

    def row_of_table(self) -> str:
        """The container's line in the table of docs/convert.md."""
        groups = ", ".join(map(str, self.groups)) or "any"
        cells = (
            f"`{self.name}`", self.engines, ", ".join(map(str, self.bits)), groups + (", a row" if self.row else ""),
            "yes" if self.mixed else "no", "yes" if self.tables else "no", "yes" if self.head else "no",
        )  # fmt: skip
        return f"| {' | '.join(cells)} |"

    def _unfit(self, x: Outcome) -> str | None:
        form = x.format
        if form is None:
            return (
                f"'{x.name}' is {x.scheme.describe()}, and {self.name} holds integers with whole zero points alone. "
                f"Nearest: {self.example}; export 'lilliput' holds what it is"
            )
        return self._misplaced(x) or self._unshaped(x, form)

    def _misplaced(self, x: Outcome) -> str | None:
        """Why a linear of this kind has no place."""
        if x.transposed:
            return f"'{x.name}' is stored as [in, out] (Conv1D), which no engine looks for. Nearest: export 'lilliput'"
        if x.router:
            return f"'{x.name}' is a router, which no engine was tried with. Nearest: exclude 'router'"
        if (x.embedding or x.also) and not self.tables:
            return f"'{x.name}' is an embedding, which {self.name} has no codes for. Nearest: exclude 'embed'"
        if x.table and not x.embedding and not self.head:
            return f"'{x.name}' is the head, which {self.name} has no codes for. Nearest: exclude 'lm_head'"
        return None

    def _unshaped(self, x: Outcome, form: IntegerFormat) -> str | None:
        if form.bits > self.bits[-1]:
            return f"'{x.name}' has {form.bits} bits, and {self.name} has {self.bits[-1]} at most. Nearest: gptq or mlx"
        if form.group_size > 0 and x.in_features % form.group_size:
            return (
                f"groups of {form.group_size} do not divide the {x.in_features} inputs of '{x.name}'. "
                "Nearest: a group size that does, or 'channel'"
            )
        if self.group(x) == 0:
            return (
                f"'{x.name}' has groups of {form.group_size if form.group_size > 0 else x.in_features} inputs, and "
                f"{self.name} has groups of {', '.join(map(str, self.groups))}. Nearest: one of these"
            )
        if form.scale_dtype == torch.float32:
            return f"'{x.name}' has float32 scales, and {self.name} holds 16 bits. Nearest: scale_dtype float16"
        for what, size, step in (("outputs", x.out_features, self.steps[0]), ("inputs", x.in_features, self.steps[1])):
            if size % step:
                return f"'{x.name}' has {size} {what}, no multiple of {step}. Nearest: leave it out of every step"
        return None
