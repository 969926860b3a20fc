"""A native folder as the checkpoint that it was made from would be read: dense tensors by their stored names."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lilliput.parts.linear import decode
from lilliput.source.source import Source


def weights(source: Source, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by its stored name, one at a time; packed ones are rounded once, from float32 to `dtype`.

    A tensor that several modules use comes once for each of them, unless the config ties them.
    """
    tied = bool(getattr(source.text_config, "tie_word_embeddings", False))
    for name in source.stored:
        spec = source.linear(name)
        if spec is None:
            yield name, source.read(name)
            continue
        weight = decode(spec, source.part, dtype)
        weight = weight.T.contiguous() if spec.transposed else weight
        yield name, weight
        if not tied:
            for other in spec.also:
                yield f"{other}.weight", weight
