"""An adapter merged into the folder that it was trained for: a folder that computes the same without it.

Products are added to plain linears, and to the real zeros of codes where each group gets one number (QA-LoRA); biases
to biases. Codes stay as they are: what could only be had by quantizing anew is refused, with what that would lose.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.export import provenance
from lilliput.export.convert.folder import staged, vacant
from lilliput.formats import groups
from lilliput.formats.affine import AffineFormat
from lilliput.model.stored import Model, Ref, open_model
from lilliput.parts.quantized import QuantizedPart
from lilliput.run.output import Output
from lilliput.runtime import adapter as adapter_files
from lilliput.runtime.adapter import Change
from lilliput.source import layers
from lilliput.source.shards import header_of
from lilliput.training.packed import is_packed
from lilliput.units import few

PRUNED = 0.01  # share of zeros from which on a plain linear counts as pruned

Fresh = dict[str, Callable[[], Tensor]]  # tensors of the files that change, computed when they are written


@dataclass(frozen=True)
class Merged:
    """What was merged. linears: how many products, biases: how many of those; bytes: of the written folder."""

    out: str
    adapter: str
    linears: int
    biases: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dict(vars(self))


def merge(folder: Path, out: Path, adapter: Path | None = None, rank: int | None = None) -> Merged:
    """Write the folder with an adapter of its own (adapter None: its subfolder "adapter") as `out`.

    rank: of an adapter by DyLoRA, to which it is cut. Raises PlanError for an adapter that does not change weights, and
    for linears that cannot take it up, with the error that quantizing anew would make.
    """
    vacant(out)
    place = folder / "adapter" if adapter is None else adapter
    changes = adapter_files.changes(place, rank)
    model = open_model(folder)
    _known(model, changes, place)
    lost: dict[str, float | None] = {}
    fresh: Fresh = {}
    for name, change in changes.items():
        if change.bias is not None:
            fresh |= _bias(model, name, change.bias)
        elif is_packed(model.source, model.stored_name(f"{name}.weight").removesuffix(".weight")):
            taken = _zeros(model, name, change)
            if taken is None:
                lost[name] = _lost(model, name, change)
            else:
                fresh |= taken
        else:
            fresh |= _plain(model, name, change)
    if lost:
        known = [x for x in lost.values() if x is not None]
        cost = f"; quantizing anew would lose {max(known):.0%} of what the adapter adds, at worst" if known else ""
        raise PlanError(
            f"{few(list(lost))} hold codes, which a product of low rank cannot be merged into as they are{cost}. Keep "
            "the adapter beside the folder, or train one that can be merged: `qa-lora` on format affine"
        )
    size = _write(folder, out, fresh, place)
    biases = sum(x.bias is not None for x in changes.values())
    return Merged(str(out), str(place), len(changes) - biases, biases, size)


def _known(model: Model, changes: Mapping[str, Change], place: Path) -> None:
    missing = [x for x in changes if f"{x}.weight" not in model.refs]
    if missing:
        raise PlanError(f"{place} is an adapter of another model: {missing[0]} is not in {model.source.model}")
    fused = [x for x in changes if not _alone(model.refs[f"{x}.weight"])]
    if fused:
        raise PlanError(f"{fused[0]} is part of a tensor of several linears: keep the adapter beside the folder")


def _alone(ref: Ref) -> bool:
    """Whether the file holds a tensor by itself, and as the module has it."""
    return ref.index is None and ref.rows is None and not ref.transposed


def _plain(model: Model, name: str, change: Change) -> Fresh:
    """The weight with the product, rounded once to the type that the file has."""
    key = f"{name}.weight"
    zeros = float((model.read(key) == 0).float().mean())
    if zeros > PRUNED:
        raise PlanError(
            f"{name} is pruned ({zeros:.0%} of it are 0), and the product would fill its zeros: keep the adapter "
            "beside the folder"
        )

    def summed() -> Tensor:
        weight, product = model.read(key), change.product()
        product = product.T if _transposed(model, name) else product
        return (weight.float() + product).to(weight.dtype)

    return {model.stored_name(key): summed}


def _transposed(model: Model, name: str) -> bool:
    """Whether the module holds its weight as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(model.skeleton.model.get_submodule(name), Conv1D)


def _bias(model: Model, name: str, change: Tensor) -> Fresh:
    key = f"{name}.bias"
    if key not in model.refs:
        raise PlanError(f"{name} has no bias in this architecture that could take one up: keep the adapter beside it")

    def summed() -> Tensor:
        bias = model.read(key)
        return (bias.float() + change).to(bias.dtype)

    return {model.stored_name(key): summed}


def _zeros(model: Model, name: str, change: Change) -> Fresh | None:
    """Real zeros that take up the product; None where it is not one number for each group, or there are none."""
    spec = model.source.linear(model.stored_name(f"{name}.weight"))
    form = None if spec is None else spec.scheme.grid
    if spec is None or not isinstance(form, AffineFormat) or form.scale_dtype != torch.float32 or change.down is None:
        return None
    group = groups.index(spec.in_features, form.group_size)
    first = torch.zeros(int(group.max()) + 1, dtype=torch.int64).scatter_reduce(
        0, group, torch.arange(len(group)), "amin", include_self=False
    )
    if not torch.equal(change.down, change.down[:, first][:, group]):
        return None
    each = replace(change, down=change.down[:, first])
    payload, key = spec.payload, f"{spec.payload}_zero"

    def moved() -> Tensor:
        scale, zero = model.source.part(f"{payload}_scale").double(), model.source.part(key)
        return (zero.double() - each.product().double() / scale).to(zero.dtype)

    return {key: moved}


def _lost(model: Model, name: str, change: Change) -> float | None:
    """The error of quantizing the sum anew, relative to what the adapter adds; None where that takes more than a
    grid."""
    shape = model.skeleton.shapes[f"{name}.weight"]
    rows, width = shape[::-1] if _transposed(model, name) else shape
    stored = model.stored_name(f"{name}.weight").removesuffix(".weight")
    layer = layers.layer(model.source, stored, name, rows, width, transposed=_transposed(model, name))
    if len(layer.parts) != 1 or layer.inputs or layer.outputs or not isinstance(layer.parts[0], QuantizedPart):
        return None
    product, form = change.product(), layer.parts[0].format
    wanted = layer.decode() + product
    grid = form.fit(wanted)
    again = QuantizedPart(form, form.encode(wanted, grid), grid).decode()
    return float((again - wanted).norm() / product.norm().clamp_min(1e-30))


def _write(folder: Path, out: Path, fresh: Fresh, adapter: Path) -> int:
    """The folder with other tensors, one at a time, without the adapter; its bytes."""
    hashes: dict[str, str] = {}
    with staged(out) as place:
        for path in sorted(folder.iterdir()):
            if path.resolve() == adapter.resolve():
                continue
            if path.is_dir():
                shutil.copytree(path, place / path.name)
            elif path.suffix != ".safetensors":
                shutil.copyfile(path, place / path.name)
            else:
                hashes |= _file(path, place, fresh)
        if fresh.keys() - hashes.keys():
            missing = min(fresh.keys() - hashes.keys())
            raise PlanError(f"{missing} is in no file of {folder}: give a folder that compress has written")
        record = provenance.read(place)
        if record is not None:
            rows = tuple(replace(x, sha256=hashes[x.name]) if x.name in fresh else x for x in record.tensors)
            notes = (*record.notes, f"An adapter was merged into {len(fresh)} tensors; figures are from before.")
            own = f"{adapter.name}/"
            trained = tuple(
                replace(x, adapter={k: v for k, v in x.adapter.items() if not k.startswith(own)})
                for x in record.training
            )
            record = replace(record, tensors=rows, notes=notes, training=trained)
            (place / provenance.NAME).write_text(record.to_json(), encoding="utf-8")
        return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())


def _file(path: Path, place: Path, fresh: Fresh) -> dict[str, str]:
    """A file again, with other tensors where there are; sha256 of all."""
    contents = {name: (entry.dtype, entry.shape) for name, (entry, _) in header_of(path).items()}
    output = Output(place, {path.name: contents})
    output.lay_out()
    with safe_open(path, "pt") as file:

        def pieces(name: str) -> list[Tensor]:
            return [(fresh[name]() if name in fresh else file.get_tensor(name)).contiguous()]

        hashes = output.write(contents, pieces)
    output.finish()
    return hashes
