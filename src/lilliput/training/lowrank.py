"""What the adapters of the LoRA family share: a product of two thin factors beside a linear, as peft holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.anatomy.model import Linear
from lilliput.parts.scheme import Scheme
from lilliput.target import Target
from lilliput.training import borrowed
from lilliput.training.borrowed import ADAPTER, Borrowed
from lilliput.verbs.adapt import AdapterOptions, AdaptIO


class LowRankOptions(AdapterOptions):
    """What adapters of low rank have."""

    alpha: float | None = Field(
        None, gt=0.0, description="the product is multiplied with alpha / rank; none: twice the rank"
    )
    dropout: float = Field(0.05, ge=0.0, lt=1.0, description="share of the inputs that a step leaves out")


def rank_of(target: Target) -> int:
    """The rank of a step, which its target has by default. Raises RuntimeError where it has none."""
    if target.rank is None:
        raise RuntimeError("the target has no rank: give the method's spec one as its default")
    return target.rank


def alpha_of(target: Target, o: LowRankOptions) -> float:
    """What the product is multiplied with, times the rank."""
    return 2.0 * rank_of(target) if o.alpha is None else o.alpha


def admits(linear: Linear, scheme: Scheme, target: Target, o: Any) -> str | None:
    """A product of full rank or more would cost more than a weight of its own."""
    rank, most = rank_of(target), min(linear.out_features, linear.in_features)
    if rank > most:
        return (
            f"a product of rank {rank} beside a [{linear.out_features}, {linear.in_features}] linear is larger than "
            f"it: ask for a rank of {most} or less, or leave it out with `where`"
        )
    return None


def parameters(linears: Sequence[Linear], target: Target, o: Any) -> int:
    """Both factors of each."""
    return rank_of(target) * sum(x.out_features + x.in_features for x in linears)


def config(io: AdaptIO, target: Target, o: LowRankOptions) -> Any:
    """peft's for a product beside each of the linears."""
    return borrowed.peft().LoraConfig(
        r=rank_of(target),
        lora_alpha=alpha_of(target, o),
        lora_dropout=o.dropout,
        target_modules=borrowed.names(io.linears),
        fan_in_fan_out=borrowed.fan_in(io.skeleton.model, io.linears),
        bias="none",
        task_type="CAUSAL_LM",
    )


class LowRank(Borrowed):
    """Products beside linears. factors: of each, A [rank, in] and B [out, rank], by the linear's name."""

    def factors(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """The trained tensors themselves."""
        layers = self.layers(borrowed.peft().tuners.lora.LoraLayer)
        return {name: (x.lora_A[ADAPTER].weight, x.lora_B[ADAPTER].weight) for name, x in layers.items()}

    @torch.no_grad()
    def begin_at(self, name: str, down: Tensor, up: Tensor) -> None:
        """Take the factors down [rank, in] and up [out, rank], whose product counts alpha / rank times."""
        a, b = self.factors()[name]
        a.copy_(down)
        b.copy_(up)


Start = Literal["zero", "loftq"]
