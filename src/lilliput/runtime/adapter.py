"""The folder of an adapter, read as what it adds to linears, and put beside those of a loaded model or of a skeleton.

y = W x + s B A x for products of low rank, y = W x + b + b' for biases; x is what the linear is given, before it rounds
its inputs. Networks behind linears are in `lilliput.runtime.bottleneck`. What goes in front of the text (prefixes,
prompts) changes no linear, and is loaded by peft.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lilliput.errors import PlanError, SourceError
from lilliput.runtime import bottleneck
from lilliput.runtime.bottleneck import CONFIG, WEIGHTS

NESTED = "nested"  # in the metadata of products that may be cut to any rank
_PREFIX = "base_model.model."
_PLAIN = {"use_dora": False, "use_rslora": False, "bias": "none", "alpha_pattern": {}, "modules_to_save": None}


@dataclass(frozen=True)
class Change:
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

    def to(self, device: torch.device | str) -> Change:
        """The same on a device."""
        up, down, bias = (None if x is None else x.to(device) for x in (self.up, self.down, self.bias))
        return Change(up, down, self.scale, bias)

    def added(self, x: Tensor) -> Tensor:
        """What comes to the outputs [.., out] for inputs [.., in], float32."""
        if self.bias is not None:
            return self.bias
        if self.up is None or self.down is None:
            raise RuntimeError("neither a product nor a bias")
        return self.scale * (x.float() @ self.down.T) @ self.up.T


def said(place: Path) -> dict[str, Any]:
    """What the folder says of its adapter. Raises PlanError where it holds none."""
    try:
        found: dict[str, Any] = json.loads((place / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"{place} holds no adapter ({error}): name its folder with --adapter") from None
    return found


def beside_linears(place: Path) -> bool:
    """Whether the adapter is one that `attach` takes."""
    config = said(place)
    return config.get("adapter_type") == bottleneck.KIND or _unknown(config) is None


def _unknown(config: Mapping[str, Any]) -> str | None:
    """What an adapter of peft has that is no change of weights and biases alone."""
    kind = config.get("peft_type", config.get("adapter_type"))
    odd = [key for key, value in _PLAIN.items() if config.get(key, value) not in (value, None)]
    if kind in ("LORA", "ADALORA", "BEFT") and not odd:
        return None
    return f"its {odd[0]} is {config[odd[0]]}" if odd else f"it is of the kind {kind}"


def changes(place: Path, rank: int | None = None) -> dict[str, Change]:
    """What an adapter of peft adds, by the names of linears; rank: to which one by DyLoRA is cut.

    Raises PlanError for an adapter that is no change of weights and biases alone, and for a rank that it has not.
    """
    config = said(place)
    what = _unknown(config)
    if what is not None:
        raise PlanError(f"{place} is no change of weights and biases alone, as {what}: keep it beside the folder")
    try:
        with safe_open(place / WEIGHTS, "pt") as file:
            if rank is not None and (file.metadata() or {}).get(NESTED) is None:
                raise PlanError(
                    f"--rank cuts adapters by dylora, each of whose leading parts is an adapter, and {place} is not "
                    "said to be one: leave --rank out"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise PlanError(f"{place / WEIGHTS} cannot be read ({error}): train the adapter again") from None
    found: dict[str, dict[str, Tensor]] = {}
    for key, x in tensors.items():
        name, _, part = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        found.setdefault(name, {})[part] = x
    kind = config["peft_type"]
    return {name: _change(name, parts, config, kind, rank) for name, parts in found.items()}


def _change(name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], kind: str, rank: int | None) -> Change:
    if kind == "BEFT":
        return Change(bias=parts["beft_bias"].reshape(-1).float())
    up, down = parts["lora_B"].float(), parts["lora_A"].float()
    if kind == "ADALORA":
        # peft divides by the rank at first, and by a little more, so that it may be 0.
        return Change(up, down * parts["lora_E"].float(), config["lora_alpha"] / (config["init_r"] + 1e-5))
    own = len(down)
    if rank is not None and rank > own:
        raise PlanError(f"--rank is {rank}, and the product at {name} has rank {own}: ask for at most that")
    kept = own if rank is None else rank
    return Change(up[:, :kept], down[:kept], config["lora_alpha"] / kept)


def attach(model: nn.Module, place: Path, device: torch.device | str) -> None:
    """Let the linears of a model compute with an adapter from now on; its tensors lie on `device`.

    Raises PlanError for an adapter that changes no linears, and SourceError for one of another model.
    """
    plain = said(place)
    if plain.get("adapter_type") == bottleneck.KIND:
        bottleneck.attach(model, place, plain, device)
        return
    modules = dict(model.named_modules())
    for name, change in changes(place).items():
        if name not in modules:
            raise SourceError(f"{place} is an adapter of another model: {name} is not there")
        _beside(modules[name], change.to(device))


def _beside(linear: nn.Module, change: Change) -> None:
    given: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        given[:] = [args[0]]

    def after(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        x = given.pop()
        return (out.float() + change.added(x)).to(out.dtype)

    # In front of the hook that rounds inputs, whichever of both is attached first.
    linear.register_forward_pre_hook(before, prepend=True)
    linear.register_forward_hook(after)
