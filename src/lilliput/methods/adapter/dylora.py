"""DyLoRA: one product whose leading part of any rank is a product of its own.

Each step draws a rank b from `least` to r and trains with the first b rows of A and columns of B,

    y = W x + (alpha / b) B[:, :b] A[:b] x,

so that the first directions matter most, and the adapter may be cut to any rank afterwards: b rows of `lora_A`, b
columns of `lora_B`, and b for `r` in adapter_config.json. `only` gives gradients to the b-th pair alone.

Paper: Valipour et al. 2022, arXiv 2210.07558. Made with peft: what is written is a LoRA adapter of the full rank, or of
rank `cut`. Cost: that of `lora`. Limits: at full rank it is trained less than a `lora` of as many steps; with `only`
the optimizer's momentum still moves the other pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from lilliput.anatomy.model import Linear
from lilliput.parts.scheme import Scheme
from lilliput.runtime.adapter import NESTED
from lilliput.target import Target
from lilliput.training import borrowed, lowrank
from lilliput.training.borrowed import ADAPTER
from lilliput.training.lowrank import LowRank, LowRankOptions, rank_of
from lilliput.verbs.adapt import Adapt, Adapter, AdaptIO


class Options(LowRankOptions):
    """See the module's docstring."""

    least: int = Field(1, ge=1, description="smallest rank that is drawn")
    only: bool = Field(False, description="of the drawn rank only the last pair has gradients")
    cut: int | None = Field(None, ge=1, description="rank of the adapter that is written; none: the full one")


class Nested(LowRank):
    """Products that are cut to a rank while the model runs; `width`: the present one."""

    said: ClassVar[Mapping[str, str]] = {NESTED: "dylora"}

    def __init__(self, inner: Any, rank: int, o: Options) -> None:
        super().__init__(inner)
        self.rank, self.width, self._o = rank, rank, o
        for layer in self.layers(borrowed.peft().tuners.lora.LoraLayer).values():
            layer.lora_A[ADAPTER].register_forward_hook(self._cut)

    def _cut(self, module: Any, args: Any, out: Tensor) -> Tensor:
        if self.width == self.rank:
            return out
        kept = torch.arange(self.rank, device=out.device) < self.width
        return out * (kept * (self.rank / self.width)).to(out.dtype)

    def step(self, done: float) -> None:
        self.width = int(torch.randint(self._o.least, self.rank + 1, ()))

    def after_backward(self) -> None:
        if not self._o.only:
            return
        for down, up in self.factors().values():
            for slope in (down.grad, None if up.grad is None else up.grad.T):
                if slope is not None:
                    slope[: self.width - 1] = 0.0

    def after_step(self, rate: float) -> None:
        self.width = self.rank  # what is judged and written is the whole

    def tensors(self) -> dict[str, Tensor]:
        cut = self._o.cut
        found = super().tensors()
        if cut is None:
            return found
        return {n: (x[:cut] if "lora_A" in n else x[:, :cut]).contiguous() for n, x in found.items()}

    def config(self) -> Any:
        config = super().config()
        config.r = self.rank if self._o.cut is None else self._o.cut  # alpha / r follows
        return config


def attach(io: AdaptIO, target: Target, o: Options) -> Adapter:
    """Products that add nothing."""
    return Nested(borrowed.wrapped(io.skeleton.model, lowrank.config(io, target, o)), rank_of(target), o)


def admits(linear: Linear, scheme: Scheme, target: Target, o: Options) -> str | None:
    """Ranks that are drawn or cut to lie within the full one."""
    rank = rank_of(target)
    for name, value in (("least", o.least), ("cut", o.cut)):
        if value is not None and value > rank:
            return f"`{name}` is {value}, and the product has rank {rank}: take at most that"
    return lowrank.admits(linear, scheme, target, o)


METHOD = Adapt(
    paper="Valipour et al. 2022, arXiv 2210.07558",
    options=Options,
    default={"rank": 16},
    covers={"dylora": [{"method": "dylora"}]},
    attach=attach,
    admits=admits,
    parameters=lowrank.parameters,
)
