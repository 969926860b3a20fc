"""Weights of what an edit leaves, where it changes them: files of the work folder, one for each block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from lilliput.errors import LilliputError
from lilliput.export.provenance import file_sha256
from lilliput.model.edited import EditedModel
from lilliput.model.weights import Model
from lilliput.run.journal import Work, save_atomically


def _file(work: Work, step: int, block: int) -> Path:
    return work.folder / f"edit-{step:02d}-update" / f"{block:04d}.safetensors"


def write(base: Model, block: int, linears: Mapping[str, Tensor], work: Work, step: int) -> str:
    """Write linears [out, in] by name in the dtype and orientation in which `base` stores them; the file's sha256."""
    path = _file(work, step, block)
    path.parent.mkdir(exist_ok=True)
    anatomy, prefix = base.anatomy().blocks[block], base.skeleton.block_names[block]
    tensors = {}
    for name, weight in linears.items():
        stored = weight.T if anatomy.linear(name).transposed else weight
        tensors[f"{prefix}.{name}.weight"] = stored.to(base.dtype(f"{prefix}.{name}.weight")).cpu().contiguous()
    save_atomically(path, tensors)
    return file_sha256(path)


def read(level: EditedModel, work: Work, step: int, digests: Mapping[int, str]) -> EditedModel:
    """The edited model with the files of these blocks. Raises LilliputError for a file that is not as it was written.

    digests: sha256 by number of the block in the base.
    """
    files: dict[str, Path] = {}
    for block, digest in digests.items():
        path = _file(work, step, block)
        if not path.is_file() or file_sha256(path) != digest:
            raise LilliputError(f"{path} is not as this run has written it: delete {work.partial} to start again")
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    return level.updated(files) if files else level
