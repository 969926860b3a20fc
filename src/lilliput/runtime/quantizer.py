"""The transformers side of the native layout: `quant_method: "lilliput"` through `from_pretrained`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lilliput.anatomy.experts import unroll
from lilliput.anatomy.widths import resize
from lilliput.anatomy.wrapper import module_name, text_prefix
from lilliput.errors import SourceError
from lilliput.parts.linear import LinearSpec, parse_config
from lilliput.runtime import behaviours, caches
from lilliput.runtime.linear import CompressedLinear, compress_

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LilliputConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` entry of a native folder, as docs/native-format.md describes it."""

    def __init__(
        self,
        version: int,
        schemes: list[Any],
        linears: dict[str, Any],
        quant_method: str = "lilliput",
        behaviours: list[Any] | None = None,
        caches: list[Any] | None = None,
    ) -> None:
        self.quant_method = quant_method
        self.version = version
        self.schemes = schemes
        self.linears = linears
        self.behaviours = behaviours
        self.caches = caches

    def to_dict(self) -> dict[str, Any]:
        names = ["quant_method", "version", "schemes", "linears"]
        names += [name for name in ("behaviours", "caches") if getattr(self, name)]
        return {name: getattr(self, name) for name in names}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class LilliputQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps linears before the weights are loaded, and hands them their packed tensors afterwards."""

    requires_calibration = True
    is_trainable = False

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        specs = parse_config(self.quantization_config.to_dict())
        resize(model, model.config.get_text_config(decoder=True))
        self.files = list(checkpoint_files or ())
        with torch.device("cpu"):
            self.compressed = swap(model, specs.values())
        ignored = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        config = self.quantization_config
        running = (*behaviours.stored(config.behaviours or ()), *caches.stored(config.caches or ()))
        own = set(map(re.escape, running))
        model._keys_to_ignore_on_load_unexpected = ignored | own | _patterns(specs.values())

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        if not self.files:  # loaded from a state_dict: whoever gives one fills the linears
            return model
        where = _locate(self.files)
        filled: dict[tuple[str, torch.device], CompressedLinear] = {}
        for module in self.compressed:
            place = module.spec.payload, _device(module, model)
            if place in filled:
                module.share(filled[place])
            else:
                module.fill(_read(where, list(module.spec.describe())), place[1])
                filled[place] = module
        prefix, modules = text_prefix(model, model.config), dict(model.named_modules())

        def read(name: str) -> Tensor:
            return _read(where, [name])[name]

        def locate(name: str) -> str:
            return module_name(name, modules, prefix)

        if entries := self.quantization_config.behaviours:
            behaviours.install(model, entries, read, locate)
        if entries := self.quantization_config.caches:
            caches.install(model, entries, read, locate)
        return model


def swap(model: PreTrainedModel, specs: Iterable[LinearSpec]) -> list[CompressedLinear]:
    """Make the described linears of a model compressed; batched experts become separate linears first.

    Raises SourceError where the model has no such linear, or one of another shape.
    """
    prefix = text_prefix(model, model.config)
    modules = dict(model.named_modules())
    swapped: list[CompressedLinear] = []
    for spec in (y for x in specs for y in (x, *(replace(x, name=name) for name in x.also))):
        if spec.also:
            _untie(model, modules, prefix, spec)
        name = module_name(spec.name, modules, prefix)
        if name not in modules:
            _unroll_above(model, modules, name)
        module = modules.get(name)
        if module is None:
            raise SourceError(
                f"config.json describes a compressed linear '{spec.name}', and {type(model).__name__} of this "
                "transformers has none: load it with the transformers named in lilliput.json"
            )
        try:
            compress_(module, spec)
        except (KeyError, ValueError) as error:
            raise SourceError(f"the folder does not fit {type(model).__name__}: {error}") from None
        if isinstance(module, CompressedLinear):
            swapped.append(module)
    return swapped


def _untie(model: PreTrainedModel, modules: Mapping[str, nn.Module], prefix: str, spec: LinearSpec) -> None:
    """Let transformers tie no parameters that are none any more: modules of one description share packed tensors."""
    model.config.get_text_config(decoder=True).tie_word_embeddings = False
    model.config.tie_word_embeddings = False
    tied = {f"{module_name(name, modules, prefix)}.weight" for name in (spec.name, *spec.also)}
    for holder in (x for x in model.modules() if getattr(x, "all_tied_weights_keys", None)):
        remaining = {k: v for k, v in holder.all_tied_weights_keys.items() if k not in tied and v not in tied}
        holder.all_tied_weights_keys = remaining


def _unroll_above(model: nn.Module, modules: dict[str, nn.Module], name: str) -> None:
    """Replace the batched experts that hold the linear `name`, if there are such, by separate linears."""
    path = name
    while path and path not in modules:
        path = path.rpartition(".")[0]
    unrolled = unroll(modules[path]) if path else None
    if unrolled is not None:
        model.set_submodule(path, unrolled)
        modules |= {f"{path}.{n}" if n else path: m for n, m in unrolled.named_modules()}


def _patterns(specs: Iterable[LinearSpec]) -> set[str]:
    """Patterns of the tensors that transformers finds in the files and not in the model: numbers stand for any number.

    Files may name a linear below another prefix than the model; batched experts appear under their merged names.
    """
    names: set[str] = set()
    for spec in specs:
        for name in (spec.name, spec.stored, *spec.also):
            names.add(re.sub(r"\d+", r"\\d+", re.escape(f"{name}.weight")))
            above, experts, _ = name.rpartition(".experts.")
            if experts:
                names.add(re.sub(r"\d+", r"\\d+", re.escape(f"{above}.experts.")))
    return names


def _locate(files: Sequence[str]) -> dict[str, str]:
    """Tensor name to the file that holds it."""
    where: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            where |= dict.fromkeys(opened.keys(), file)
    return where


def _read(where: Mapping[str, str], names: Sequence[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in names:
        if name not in where:
            raise SourceError(f"tensor '{name}' is in no file of the folder: write or download it again")
        with safe_open(where[name], framework="pt") as opened:
            tensors[name] = opened.get_tensor(name)
    return tensors


def _device(module: nn.Module, model: nn.Module) -> torch.device:
    """Where the module runs: what accelerate says, else where the model's first parameter is."""
    hook = getattr(module, "_hf_hook", None)
    placed = getattr(hook, "execution_device", None)
    return torch.device(placed) if placed is not None else next(model.parameters()).device
