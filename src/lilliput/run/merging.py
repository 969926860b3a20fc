"""An adapter merged into the folder that it was trained for: a folder that computes the same without it.

Products are added to plain linears, and to the real zeros of codes where each group gets one number (QA-LoRA); biases
to biases. Codes stay as they are: what could only be had by quantizing anew is refused, with what that would lose.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
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
from lilliput.plan.tensors import METADATA
from lilliput.run.journal import save_atomically
from lilliput.source import layers
from lilliput.training.borrowed import CONFIG, NESTED, WEIGHTS
from lilliput.training.packed import is_packed
from lilliput.units import few

PREFIX = "base_model.model."
PRUNED = 0.01  # share of zeros from which on a plain linear counts as pruned
_PLAIN = {"use_dora": False, "use_rslora": False, "bias": "none", "alpha_pattern": {}, "modules_to_save": None}


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


@dataclass(frozen=True)
class _Change:
    """What an adapter adds to a linear: scale * up [out, r] @ down [r, in]; bias [out]."""

    up: Tensor | None = None
    down: Tensor | None = None
    scale: float = 1.0
    bias: Tensor | None = None

    def product(self) -> Tensor:
        """Float32 [out, in]."""
        if self.up is None or self.down is None:
            raise RuntimeError("a bias is no product")
        return (self.scale * self.up.double() @ self.down.double()).float()


def merge(folder: Path, out: Path, adapter: Path | None = None, rank: int | None = None) -> Merged:
    """Write the folder with an adapter of its own (adapter None: its subfolder "adapter") as `out`.

    rank: of an adapter by DyLoRA, to which it is cut. Raises PlanError for an adapter that does not change weights, and
    for linears that cannot take it up, with the error that quantizing anew would make.
    """
    vacant(out)
    place = folder / "adapter" if adapter is None else adapter
    changes = _read(place, rank)
    model = open_model(folder)
    _known(model, changes, place)
    lost: dict[str, float | None] = {}
    fresh: dict[str, Tensor] = {}
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


def _read(place: Path, rank: int | None) -> dict[str, _Change]:
    """What an adapter of peft changes, by the names of linears."""
    try:
        config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"{place} holds no adapter ({error}): name its folder with --adapter") from None
    kind = config.get("peft_type", config.get("adapter_type"))
    odd = [key for key, value in _PLAIN.items() if config.get(key, value) not in (value, None)]
    if kind not in ("LORA", "ADALORA", "BEFT") or odd:
        what = f"its {odd[0]} is {config[odd[0]]}" if odd else f"it is of the kind {kind}"
        raise PlanError(f"{place} is no change of weights and biases alone, as {what}: keep it beside the folder")
    with safe_open(place / WEIGHTS, "pt") as file:
        if rank is not None and (file.metadata() or {}).get(NESTED) is None:
            raise PlanError(
                f"--rank cuts adapters by dylora, each of whose leading parts is an adapter, and {place} is not said "
                "to be one: leave --rank out"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found: dict[str, dict[str, Tensor]] = {}
    for key, x in tensors.items():
        name, _, part = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        found.setdefault(name, {})[part] = x
    return {name: _change(name, parts, config, kind, rank) for name, parts in found.items()}


def _change(name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], kind: str, rank: int | None) -> _Change:
    if kind == "BEFT":
        return _Change(bias=parts["beft_bias"].reshape(-1).float())
    up, down = parts["lora_B"].float(), parts["lora_A"].float()
    if kind == "ADALORA":
        # peft divides by the rank at first, and by a little more, so that it may be 0.
        return _Change(up, down * parts["lora_E"].float(), config["lora_alpha"] / (config["init_r"] + 1e-5))
    own = len(down)
    if rank is not None and rank > own:
        raise PlanError(f"--rank is {rank}, and the product at {name} has rank {own}: ask for at most that")
    kept = own if rank is None else rank
    return _Change(up[:, :kept], down[:kept], config["lora_alpha"] / kept)


def _known(model: Model, changes: Mapping[str, _Change], place: Path) -> None:
    missing = [x for x in changes if f"{x}.weight" not in model.refs]
    if missing:
        raise PlanError(f"{place} is an adapter of another model: {missing[0]} is not in {model.source.model}")
    fused = [x for x in changes if not _alone(model.refs[f"{x}.weight"])]
    if fused:
        raise PlanError(f"{fused[0]} is part of a tensor of several linears: keep the adapter beside the folder")


def _alone(ref: Ref) -> bool:
    """Whether the file holds a tensor by itself, and as the module has it."""
    return ref.index is None and ref.rows is None and not ref.transposed


def _plain(model: Model, name: str, change: _Change) -> dict[str, Tensor]:
    """The weight with the product, rounded once to the type that the file has."""
    weight, product = model.read(f"{name}.weight"), change.product()
    product = product.T if _transposed(model, name) else product
    zeros = float((weight == 0).float().mean())
    if zeros > PRUNED:
        raise PlanError(
            f"{name} is pruned ({zeros:.0%} of it are 0), and the product would fill its zeros: keep the adapter "
            "beside the folder"
        )
    return {model.stored_name(f"{name}.weight"): (weight.float() + product).to(weight.dtype)}


def _transposed(model: Model, name: str) -> bool:
    """Whether the module holds its weight as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(model.skeleton.model.get_submodule(name), Conv1D)


def _bias(model: Model, name: str, change: Tensor) -> dict[str, Tensor]:
    key = f"{name}.bias"
    if key not in model.refs:
        raise PlanError(f"{name} has no bias in this architecture that could take one up: keep the adapter beside it")
    bias = model.read(key)
    return {model.stored_name(key): (bias.float() + change).to(bias.dtype)}


def _zeros(model: Model, name: str, change: _Change) -> dict[str, Tensor] | None:
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
    each = replace(change, down=change.down[:, first]).product().double()
    scale, key = model.source.part(f"{spec.payload}_scale").double(), f"{spec.payload}_zero"
    zero = model.source.part(key)
    return {key: (zero.double() - each / scale).to(zero.dtype)}


def _lost(model: Model, name: str, change: _Change) -> float | None:
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


def _write(folder: Path, out: Path, fresh: Mapping[str, Tensor], adapter: Path) -> int:
    """The folder with other tensors, without the adapter; its bytes."""
    left = dict(fresh)
    with staged(out) as place:
        for path in sorted(folder.iterdir()):
            if path.resolve() == adapter.resolve():
                continue
            if path.is_dir():
                shutil.copytree(path, place / path.name)
            elif path.suffix != ".safetensors":
                shutil.copyfile(path, place / path.name)
            else:
                with safe_open(path, "pt") as file:
                    names = list(file.keys())
                    tensors = {n: left.pop(n).contiguous() if n in left else file.get_tensor(n) for n in names}
                save_atomically(place / path.name, tensors, METADATA)
        if left:
            raise PlanError(f"{next(iter(left))} is in no file of {folder}: give a folder that compress has written")
        record = provenance.read(place)
        if record is not None:
            rows = tuple(
                replace(x, sha256=provenance.sha256(fresh[x.name])) if x.name in fresh else x for x in record.tensors
            )
            notes = (*record.notes, f"An adapter was merged into {len(fresh)} tensors; figures are from before.")
            (place / provenance.NAME).write_text(replace(record, tensors=rows, notes=notes).to_json(), encoding="utf-8")
        return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
