"""What everybody sees of a model: its tensors by the names of the module tree, read on demand.

`stored.StoredModel` reads them from files. The other implementations are views: each holds a base and changes what is
read of it, and computes nothing ahead (`rotated.RotatedModel` turns its residual stream). Passes, plans, exports and
metrics take any of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lilliput.anatomy.model import Anatomy

if TYPE_CHECKING:  # which import transformers, and methods are listed without it
    from lilliput.anatomy.skeleton import Skeleton
    from lilliput.source import Source
    from lilliput.source.names import Ref

TABLE_ROWS = 4096  # rows of the token table read at a time


class Model(Protocol):
    """A language model whose tensors are read by canonical name.

    source: its files; skeleton: its module tree, on the meta device but for what is loaded; refs: canonical name ->
    where it lies in the files; carried: stored tensors that the language model does not know (vision towers, buffers of
    old versions), to be written through unchanged; copies: stored tensors that only repeat a tied one, not to be
    written; fused: experts that transformers loads only as part of a 3-D tensor; notes: what a user should know.
    """

    source: Source
    skeleton: Skeleton
    refs: Mapping[str, Ref]
    carried: tuple[str, ...]
    copies: tuple[str, ...]
    fused: tuple[str, ...]
    notes: tuple[str, ...]

    def anatomy(self) -> Anatomy:
        """What the model is made of; found once."""
        ...

    def read(self, canonical: str) -> Tensor:
        """A tensor by canonical name: contiguous, on the CPU."""
        ...

    def read_rows(self, canonical: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor; contiguous, on the CPU."""
        ...

    def spans(self, canonical: str, rows: Tensor) -> Iterator[tuple[int, int]]:
        """What to read, [start, stop) at a time, to see the rows int64 [n] (ascending, each once) of a tensor."""
        ...

    def stored_name(self, canonical: str) -> str:
        """Name under which to write a tensor."""
        ...

    def shape(self, canonical: str) -> tuple[int, ...]:
        """Shape of a canonical tensor."""
        ...

    def dtype(self, canonical: str) -> torch.dtype:
        """Dtype of a canonical tensor in the files."""
        ...

    def parts(self, canonical: str) -> tuple[str, ...]:
        """Names in the files of what a canonical tensor is stored as, or is a part of."""
        ...

    # What follows from the above.

    @property
    def config(self) -> Any:
        """The whole config, that of transformers."""
        return self.source.config

    @property
    def raw(self) -> Mapping[str, Any]:
        """The entries of config.json, as they stand there."""
        return self.source.raw

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.skeleton.tied

    @property
    def positions(self) -> int | None:
        """Tokens of the longest context that the model knows; None where its config names no limit."""
        return self.skeleton.positions

    @property
    def vocabulary(self) -> int:
        """Rows of the token embedding: ids from there on cannot be read."""
        table: Any = self.skeleton.model.get_input_embeddings()  # type: ignore[operator]
        return int(table.weight.shape[0])

    def written_dtype(self, canonical: str) -> torch.dtype:
        """Dtype in which a dense tensor is written: its own, but float16 for what a GGUF file held in blocks."""
        dtype = self.dtype(canonical)
        return torch.float16 if self.source.from_gguf and dtype == torch.float32 else dtype

    def load(self, names: Iterable[str]) -> None:
        """Read tensors into the skeleton by canonical name, one at a time."""
        for name in names:
            self.skeleton.load({name: self.read(name)})

    def unload(self, names: Iterable[str]) -> None:
        """Send tensors of the skeleton back to the meta device."""
        self.skeleton.unload(names)

    def load_block(self, i: int) -> None:
        """Read block i into the skeleton."""
        self.load(self.skeleton.names_of(i))

    def unload_block(self, i: int) -> None:
        """Free block i of the skeleton."""
        self.unload(self.skeleton.names_of(i))


def stretches(rows: Tensor, count: int) -> Iterator[tuple[int, int]]:
    """The stretches of `TABLE_ROWS` of `count` rows in which any of the rows int64 [n] lies."""
    for number in sorted(set((rows // TABLE_ROWS).tolist())):
        yield number * TABLE_ROWS, min((number + 1) * TABLE_ROWS, count)
