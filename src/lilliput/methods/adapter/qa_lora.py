"""QA-LoRA: a product that sees the mean of each group of inputs, so that it can be merged into the zeros of the codes.

    y = W x + (alpha / r) B A m(x),   m(x)_g = mean of the inputs of group g,   A [r, groups], B [out, r],

where W is (q - z) s with real zeros z of the same groups. The product adds the same number to all weights of a group,
(alpha / r) (B A)[o, g] / size, which z takes up: z - that / s. Codes and scales stay, and so does what the model
computes (`lilliput merge`).

Paper: Xu et al. 2023, arXiv 2309.14717. Made with peft: what is written is a LoRA adapter whose `lora_A` has the
columns of a group alike. Cost: that of `lora`, with fewer numbers in A. Limits: linears on the format `affine` whose
zeros are stored in float32; in 16 bits they would round what is merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.anatomy.model import Linear
from lilliput.formats import groups
from lilliput.formats.affine import AffineFormat
from lilliput.parts.scheme import Scheme
from lilliput.target import Target
from lilliput.training import borrowed, lowrank
from lilliput.training.borrowed import ADAPTER
from lilliput.training.lowrank import LowRank, LowRankOptions, rank_of
from lilliput.verbs.adapt import Adapt, Adapter, AdaptIO


class Options(LowRankOptions):
    """See the module's docstring."""


class Means(nn.Module):
    """A on the means of groups. weight: float32 [rank, groups]; group: of each input, int64 [in]."""

    group: Tensor
    size: Tensor

    def __init__(self, rank: int, group: Tensor) -> None:
        super().__init__()
        self.register_buffer("group", group, persistent=False)
        self.register_buffer("size", group.bincount().float(), persistent=False)
        self.weight = nn.Parameter(torch.empty(rank, int(group.max()) + 1, device=group.device))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def whole(self) -> Tensor:
        """A [rank, in] that does the same to the inputs themselves."""
        return (self.weight / self.size)[:, self.group]

    def forward(self, x: Tensor) -> Tensor:
        means = x.new_zeros(*x.shape[:-1], len(self.size)).index_add(-1, self.group, x) / self.size.to(x.dtype)
        return nn.functional.linear(means, self.weight.to(x.dtype))


class Grouped(LowRank):
    """Products on means."""

    def tensors(self) -> dict[str, Tensor]:
        found = super().tensors()
        for name, layer in self.layers(borrowed.peft().tuners.lora.LoraLayer).items():
            own = layer.lora_A[ADAPTER].whole().detach().cpu().contiguous()
            found[f"base_model.model.{name}.lora_A.weight"] = own
        return found


def form_of(scheme: Scheme) -> AffineFormat | None:
    """The grid of a linear whose zeros can take up a number for each group; None: it has none."""
    return scheme.grid if isinstance(scheme.grid, AffineFormat) else None


def attach(io: AdaptIO, target: Target, o: Options) -> Adapter:
    """Products that add nothing, with A in place of peft's."""
    inner: Any = borrowed.wrapped(io.skeleton.model, lowrank.config(io, target, o))
    adapter = Grouped(inner)
    layers = adapter.layers(borrowed.peft().tuners.lora.LoraLayer)
    for x in io.linears:
        form = form_of(x.scheme)
        if form is None:
            raise RuntimeError(f"{x.name} has no real zeros, which admits() should have refused")
        layer = layers[x.name]
        group = groups.index(x.linear.in_features, form.group_size, io.skeleton.device)
        layer.lora_A[ADAPTER] = Means(rank_of(target), group)
    return adapter


def admits(linear: Linear, scheme: Scheme, target: Target, o: Options) -> str | None:
    """Real zeros in float32."""
    form = form_of(scheme)
    if form is None or form.scale_dtype != torch.float32:
        return (
            f"it is stored as {scheme.describe()}, and a product is merged into real zeros in float32: quantize with "
            "target {format: affine, scale_dtype: float32} first, or train a `lora`, which is not merged"
        )
    rank, most = rank_of(target), min(linear.out_features, groups.count(linear.in_features, form.group_size))
    if rank > most:
        return (
            f"a product of rank {rank} on {most} groups or outputs: ask for a rank of {most} or less, or smaller groups"
        )
    return None


def parameters(linears: Sequence[Linear], target: Target, o: Options) -> int:
    """At most those of both factors."""
    return lowrank.parameters(linears, target, o)


METHOD = Adapt(
    paper="Xu et al. 2023, arXiv 2309.14717",
    options=Options,
    default={"rank": 2},
    covers={
        "qa-lora": [
            {"method": "rtn", "target": {"format": "affine", "bits": 4, "group_size": 32, "scale_dtype": "float32"}},
            {"method": "qa-lora", "target": {"rank": 2}},
        ]
    },
    recipe=[
        {"method": "rtn", "target": {"format": "affine", "bits": 4, "group_size": 32, "scale_dtype": "float32"}},
        {"method": "qa-lora", "target": {"rank": 2}},
    ],
    attach=attach,
    admits=admits,
    parameters=parameters,
)
