"""A model of which one table is read with other rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lilliput.anatomy.model import Anatomy
from lilliput.model.weights import Model

Rows = Callable[[Tensor], Tensor]


class ChangedTable(Model):
    """A view of a model: rows of the tensor `name` are what `become` makes of them, float32 [rows, width]."""

    def __init__(self, base: Model, name: str, become: Rows) -> None:
        self.base, self._name, self._become = base, name, become
        self.source, self.skeleton, self.refs = base.source, base.skeleton, base.refs
        self.carried, self.copies, self.fused, self.notes = base.carried, base.copies, base.fused, base.notes

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def raw(self) -> Mapping[str, Any]:
        return self.base.raw

    def anatomy(self) -> Anatomy:
        return self.base.anatomy()

    def read(self, canonical: str) -> Tensor:
        value = self.base.read(canonical)
        return self._become(value.float()).to(value.dtype) if canonical == self._name else value

    def read_rows(self, canonical: str, start: int, stop: int) -> Tensor:
        value = self.base.read_rows(canonical, start, stop)
        return self._become(value.float()).to(value.dtype) if canonical == self._name else value

    def spans(self, canonical: str, rows: Tensor) -> Iterator[tuple[int, int]]:
        return self.base.spans(canonical, rows)

    def stored_name(self, canonical: str) -> str:
        return self.base.stored_name(canonical)

    def shape(self, canonical: str) -> tuple[int, ...]:
        return self.base.shape(canonical)

    def dtype(self, canonical: str) -> torch.dtype:
        return self.base.dtype(canonical)

    def parts(self, canonical: str) -> tuple[str, ...]:
        return self.base.parts(canonical)
