"""Bottleneck adapters: small networks behind linears of a loaded model, and the folder that holds them.

adapter_config.json has `adapter_type: lilliput-bottleneck`, the function between the two layers, and by linear the
width of its network; adapter_model.safetensors has LINEAR.down.weight [m, out], LINEAR.down.bias [m],
LINEAR.up.weight [out, m] and LINEAR.up.bias [out].
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lilliput.errors import SourceError

KIND = "lilliput-bottleneck"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BETWEEN: Mapping[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class Bottleneck(nn.Module):
    """h + up(act(down(h))) for h [.., size]; up is 0 at first."""

    def __init__(self, size: int, width: int, between: str) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(size, width), nn.Linear(width, size)
        self.between = BETWEEN[between]()
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        x = h.to(self.down.weight.dtype)
        out: Tensor = h + self.up(self.between(self.down(x))).to(h.dtype)
        return out


def put(linear: nn.Module, network: Bottleneck) -> None:
    """Let what leaves a linear go through a network, from now on."""

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        changed: Tensor = network(out)
        return changed

    linear.register_forward_hook(hook)


def save(folder: Path, networks: Mapping[str, Bottleneck], between: str) -> None:
    """Write networks by the names of their linears into a folder; equal ones give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{n}.{k}": x.detach().cpu().contiguous() for n, net in networks.items() for k, x in net.named_parameters()
    }
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    widths = {name: net.down.out_features for name, net in networks.items()}
    plain = {"adapter_type": KIND, "between": between, "widths": widths}
    (folder / CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def attach(model: nn.Module, folder: Path, plain: Mapping[str, Any], device: torch.device | str) -> None:
    """Give a model the adapters of a folder, whose tensors lie on `device`; plain: what its adapter_config.json says.

    Raises SourceError for another model's.
    """
    tensors, modules = load_file(folder / WEIGHTS), dict(model.named_modules())
    for name, width in plain["widths"].items():
        if name not in modules:
            raise SourceError(f"{folder} is an adapter of another model: {name} is not there")
        network = Bottleneck(len(tensors[f"{name}.up.bias"]), width, plain["between"])
        network.load_state_dict({k: tensors[f"{name}.{k}"] for k in network.state_dict()})
        put(modules[name], network.requires_grad_(False).to(device=device, dtype=torch.float32))
