"""replace: one line that says what my-method does. Now: a factor for each output of each linear is trained.

replace: the equations. y = (1 + s) W x, with s [out] = 0 at first.

Paper: replace: authors, year, arXiv number. Cost: replace: a number for each output, its gradient and two moments.
Limits: replace: what is written is loaded by nothing yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lilliput.anatomy.model import Linear
from lilliput.target import Target
from lilliput.verbs.adapt import Adapt, Adapter, AdapterOptions, AdaptIO


class Options(AdapterOptions):
    """replace: your options, each with a default and a description."""


class Factors(Adapter):
    """Factors float32 [out] by the names of linears."""

    def __init__(self, factors: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self._named = dict(factors)
        self.factors = nn.ParameterList(factors.values())

    def save(self, folder: Path) -> None:
        folder.mkdir()
        save_file({name: x.detach().cpu() for name, x in self._named.items()}, folder / "adapter_model.safetensors")


def scaled(linear: nn.Module, factor: nn.Parameter) -> None:
    """Let what leaves a linear be multiplied, from now on."""

    # replace: your equations
    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * (1 + factor)

    linear.register_forward_hook(hook)


def attach(io: AdaptIO, target: Target, o: Options) -> Adapter:
    """Factors that change nothing."""
    factors = {x.name: nn.Parameter(torch.zeros(x.linear.out_features)) for x in io.linears}
    for name, factor in factors.items():
        scaled(io.skeleton.model.get_submodule(name), factor)
    return Factors(factors)


def parameters(linears: Sequence[Linear], target: Target, o: Options) -> int:
    """One for each output."""
    return sum(x.out_features for x in linears)


METHOD = Adapt(
    paper="replace: authors, year, arXiv number",
    options=Options,
    covers={},  # replace: each catalogue id that this file implements, with the steps that run it, or None for an idea
    attach=attach,
    parameters=parameters,
    borrows=False,
)
