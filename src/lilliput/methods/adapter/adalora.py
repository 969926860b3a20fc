"""AdaLoRA: a product of rank r for each linear at the mean, of which each linear gets as much as it turns out to need.

    y = W x + (alpha / r0) P (L * (Q x)),   P [out, r0], Q [r0, in], L [r0] = 0 at first,

with a penalty orthogonal * mean(|PT P - I|^2 + |Q QT - I|^2). Each triplet of L_i, column i of P and row i of Q has a
score, smoothed sensitivity |w dw| times its smoothed deviation; the ranks of all linears together fall from r0 to r
with a cubic schedule, and L_i of the lowest scores become 0.

Paper: Zhang et al. 2023, arXiv 2303.10512. Made with peft, whose allocation is used. What is written has the ranks that
are left. Cost: that of a `lora` of rank r0, and three more numbers for each trained one. Limits: a training that ends
before the last ranks have left is written with all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from lilliput.anatomy.model import Linear
from lilliput.parts.scheme import Scheme
from lilliput.target import Target
from lilliput.training import borrowed, lowrank
from lilliput.training.borrowed import ADAPTER, Borrowed
from lilliput.training.lowrank import LowRankOptions, rank_of
from lilliput.verbs.adapt import Adapt, Adapter, AdaptIO


class Options(LowRankOptions):
    """See the module's docstring."""

    start_rank: int | None = Field(None, ge=2, description="rank of each product at first; none: one and a half times")
    still: float = Field(0.1, ge=0.0, lt=1.0, description="share of the steps before ranks begin to leave")
    settled: float = Field(0.3, ge=0.0, lt=1.0, description="share of the steps after the last ranks have left")
    every: int = Field(1, ge=1, description="steps between two allocations")
    orthogonal: float = Field(0.5, ge=0.0, description="weight of the penalty")


def first_rank(target: Target, o: Options) -> int:
    """r0, above the rank that is left at the mean."""
    rank = rank_of(target)
    return rank + max(1, rank // 2) if o.start_rank is None else o.start_rank


class Allocated(Borrowed):
    """Triplets of all linears, and their scores; count: steps that are done."""

    def __init__(self, inner: Any, o: Options) -> None:
        super().__init__(inner)
        self._o = o
        found = {n: p for n, p in inner.base_model.model.named_parameters() if "lora_" in n and p.requires_grad}
        self._average = {n: torch.zeros_like(p) for n, p in found.items()}
        self._spread = {n: torch.zeros_like(p) for n, p in found.items()}
        self._stays = {n: torch.ones(len(p), dtype=torch.int8) for n, p in found.items() if "lora_E" in n}
        self._count = torch.zeros((), dtype=torch.int64)
        self._leaves, self._slopes = found, dict[str, Tensor]()

    @property
    def final(self) -> int:
        """The step at which the last ranks leave."""
        settings = self.inner.peft_config[ADAPTER]
        return int(settings.total_step - settings.tfinal)

    def state(self) -> Mapping[str, Tensor]:
        named = {"average": self._average, "spread": self._spread, "stays": self._stays}
        return {"count": self._count} | {f"{k}.{n}": x for k, table in named.items() for n, x in table.items()}

    def penalty(self) -> Tensor | None:
        if not self._o.orthogonal:
            return None
        terms = []
        for layer in self.layers(borrowed.peft().tuners.adalora.AdaLoraLayer).values():
            for side in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER].T):
                terms.append((side @ side.T - torch.eye(len(side), device=side.device)).square().sum())
        return self._o.orthogonal * torch.stack(terms).mean()

    def after_backward(self) -> None:
        self._slopes = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in self._leaves.items()}

    def after_step(self, rate: float) -> None:
        base, settings, count = self.inner.base_model, self.inner.peft_config[ADAPTER], int(self._count)
        allocator = base.rankallocator
        allocator.ipt = {n: torch.zeros_like(x) for n, x in self._average.items()}
        allocator.exp_avg_ipt = {n: x.clone() for n, x in self._average.items()}
        allocator.exp_avg_unc = {n: x.clone() for n, x in self._spread.items()}
        settings.rank_pattern = {n: x.bool().tolist() for n, x in self._stays.items()}
        for n, p in self._leaves.items():  # which the optimizer has dropped
            p.grad = self._slopes[n]
        base.update_and_allocate(count)
        self._slopes = {}
        for p in self._leaves.values():
            p.grad = None
        for n, x in self._average.items():
            x.copy_(allocator.exp_avg_ipt.get(n, x))
            self._spread[n].copy_(allocator.exp_avg_unc.get(n, self._spread[n]))
        for n, stays in self._stays.items():
            stays.copy_(torch.tensor(settings.rank_pattern[n]))
        self._count += 1

    def tensors(self) -> dict[str, Tensor]:
        settings = self.inner.peft_config[ADAPTER]
        settled = int(self._count) > self.final
        written = {n: x.bool() for n, x in self._stays.items()}
        for stays in written.values():
            stays[0] |= not bool(stays.any())  # peft warns of products without a rank: one whose L is 0 adds nothing
        settings.rank_pattern = {n: x.tolist() for n, x in written.items()} if settled else None
        return super().tensors()


def attach(io: AdaptIO, target: Target, o: Options) -> Adapter:
    """Products that add nothing, of more rank than they will have."""
    steps = max(o.steps, 2)
    last = min(max(1, round(o.settled * steps)), steps - 1)
    config = borrowed.peft().AdaLoraConfig(
        target_r=rank_of(target),
        init_r=first_rank(target, o),
        tinit=min(round(o.still * steps), steps - last - 1),
        tfinal=last,
        deltaT=o.every,
        total_step=steps,
        orth_reg_weight=o.orthogonal,
        lora_alpha=lowrank.alpha_of(target, o),
        lora_dropout=o.dropout,
        target_modules=borrowed.names(io.linears),
        fan_in_fan_out=borrowed.fan_in(io.skeleton.model, io.linears),
        task_type="CAUSAL_LM",
    )
    return Allocated(borrowed.wrapped(io.skeleton.model, config), o)


def admits(linear: Linear, scheme: Scheme, target: Target, o: Options) -> str | None:
    """More rank at first than at last, and less than the linear has."""
    first, rank = first_rank(target, o), rank_of(target)
    if first <= rank or rank < 1:
        return (
            f"`start_rank` is {first}, and {rank} are left at the mean: begin with more than are left, and leave some"
        )
    return lowrank.admits(linear, scheme, target.model_copy(update={"rank": first}), o)


def parameters(linears: Sequence[Linear], target: Target, o: Options) -> int:
    """The triplets, and as many averages; what is written is less."""
    return 2 * sum(first_rank(target, o) * (x.out_features + x.in_features + 1) for x in linears)


METHOD = Adapt(
    paper="Zhang et al. 2023, arXiv 2303.10512",
    options=Options,
    default={"rank": 8},
    covers={"adalora": [{"method": "adalora"}]},
    attach=attach,
    admits=admits,
    parameters=parameters,
)
