"""Bytes and bits per weight of a model as it lies on disk, all overhead counted: scales, zero points, shapes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from lilliput.export import provenance
from lilliput.metrics.metric import Metric
from lilliput.model.stored import Model


@dataclass(frozen=True)
class Size:
    """bytes: the weight files, headers included; bits_per_weight: over the compressed linears (all linears of the
    blocks where none is compressed); model_bits_per_weight: all stored bits over all parameters, embeddings, norms and
    head included; compressed: how many tensors the first of the two counts cover."""

    bytes: int
    bits_per_weight: float
    model_bits_per_weight: float
    compressed: int


def measure(model: Model) -> Size:
    """The size of an opened model. Reads headers and lilliput.json only.

    Compressed linears are those that lilliput.json lists, else the tensors of the blocks that take another number of
    bytes than their plain form, else all matrices of the blocks. Raises SourceError for a damaged lilliput.json.
    """
    stored = model.source.stored
    skeleton = model.skeleton
    blocks = [name for i in range(len(skeleton.block_names)) for name in skeleton.names_of(i)]
    matrices = {model.refs[name].stored for name in blocks if len(skeleton.shapes[name]) == 2}
    record = provenance.read(model.source.folder)
    compressed = matrices & {f"{row.stored}.weight" for row in record.linears} if record is not None else set()
    if not compressed:
        compressed = {n for n in matrices if stored[n].nbytes != prod(stored[n].shape) * stored[n].dtype.itemsize}
    counted = compressed or matrices
    weights = sum(prod(stored[n].shape) for n in counted)
    return Size(
        bytes=sum(x.stat().st_size for x in model.source.files()),
        bits_per_weight=8 * sum(stored[n].nbytes for n in counted) / weights,
        model_bits_per_weight=8 * sum(x.nbytes for x in stored.values()) / sum(prod(x.shape) for x in stored.values()),
        compressed=len(compressed),
    )


METRIC = Metric(
    how="lilliput eval DIR",
    key="size.bytes, size.bits_per_weight, size.model_bits_per_weight",
    unit="bytes, bits per weight",
    interval="none: counted exactly",
    covers=("model-size",),
)
