"""A model that stays as it is while an adapter in it is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lilliput.training.student import Batch, Student
from lilliput.verbs.adapt import Adapter
from lilliput.verbs.trained import Leaves


class Adapted(Student):
    """A `Student` of which the adapter alone is trained."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter: Adapter | None = None

    def adapt(self, adapter: Adapter) -> None:
        """From now on the model computes with the adapter, which is in its place."""
        self.adapter = adapter

    def cores(self) -> Mapping[str, Leaves]:
        return {} if self.adapter is None else {"adapter": self.adapter}

    @contextmanager
    def settled(self) -> Iterator[None]:
        # The model itself was never put into training mode: what drops inputs is the adapter's.
        dropping = [x for x in self.modules() if isinstance(x, nn.Dropout) and x.training]
        try:
            for x in dropping:
                x.eval()
            yield
        finally:
            for x in dropping:
                x.train()

    def read(self, batch: Batch, cache: Any) -> Tensor:
        if self.adapter is None:
            return super().read(batch, cache)
        return self.adapter.read(self.skeleton, batch.ids, batch.positions, cache)
