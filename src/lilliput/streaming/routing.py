"""What a router makes of the tokens that pass through a block, seen where its experts are called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.anatomy.experts import UnrolledExperts
from lilliput.anatomy.model import Block
from lilliput.anatomy.skeleton import Skeleton
from lilliput.model.edit import bank_of, router_of
from lilliput.stats.routing import Routing


@dataclass
class Seen:
    """Sums so far; see `Routing`. `routing` is None where no token came."""

    experts: int
    tokens: int = 0
    chosen: Tensor = field(default_factory=lambda: torch.zeros(0))
    gates: Tensor = field(default_factory=lambda: torch.zeros(0))
    norms: Tensor = field(default_factory=lambda: torch.zeros(0))
    ranked: Tensor = field(default_factory=lambda: torch.zeros(0))
    logits: Tensor = field(default_factory=lambda: torch.zeros(0))
    now: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        self.chosen, self.gates, self.norms = (torch.zeros(self.experts, dtype=torch.float64) for _ in range(3))
        self.logits = torch.zeros(self.experts, self.experts, dtype=torch.float64)

    @property
    def routing(self) -> Routing | None:
        """What was seen."""
        if self.tokens == 0:
            return None
        return Routing(self.tokens, self.chosen, self.gates, self.norms, self.ranked, self.logits)

    def choice(self, indices: Tensor, weights: Tensor) -> None:
        """Tokens with the experts [N, k] that they chose and the weights [N, k] of those."""
        self.now = indices, weights
        number, weight = indices.detach().cpu(), weights.detach().double().cpu()
        weight = torch.where(number < self.experts, weight, torch.zeros_like(weight))  # a number beyond means none
        ones = torch.ones_like(weight)
        sums = torch.zeros(2, self.experts + 1, dtype=torch.float64)
        sums[0].index_add_(0, number.clamp(max=self.experts).flatten(), ones.flatten())
        sums[1].index_add_(0, number.clamp(max=self.experts).flatten(), weight.flatten())
        self.chosen += sums[0, :-1]
        self.gates += sums[1, :-1]
        total = weight.sum(1, keepdim=True)
        shares = weight.sort(dim=1, descending=True).values / total.where(total > 0.0, torch.ones_like(total))
        self.ranked = shares.sum(0) + (self.ranked if len(self.ranked) else 0.0)
        self.tokens += len(number)

    def output(self, expert: int, value: Tensor) -> None:
        """What an expert gives for the tokens that chose it, [n, H], in their order."""
        if self.now is None:
            raise RuntimeError("an expert ran before its router")
        token, slot = torch.where(self.now[0] == expert)
        weight = self.now[1][token, slot].detach()
        self.norms[expert] += float((value.detach().float().norm(dim=-1) * weight).double().sum())

    def scores(self, logits: Tensor) -> None:
        """Logits [N, experts] of the router."""
        exact = logits.detach().double().cpu()
        self.logits.addmm_(exact.T, exact)


@contextmanager
def watched(skeleton: Skeleton, block: int, anatomy: Block) -> Iterator[Seen | None]:
    """What the router of a loaded block chooses in the passes that run meanwhile; None where it has no experts."""
    router, name = router_of(anatomy), bank_of(anatomy)
    if router is None or name is None:
        yield None
        return
    module = skeleton.block(block)
    bank, gate = module.get_submodule(name), module.get_submodule(router)
    if not isinstance(bank, UnrolledExperts):
        raise TypeError(f"the experts {name} were replaced by {type(bank).__name__}")
    seen = Seen(bank.experts)
    width, transposed = anatomy.linear(router).in_features, anatomy.linear(router).transposed

    def on_bank(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.choice(args[1], args[2])

    def on_expert(number: int) -> Any:
        def hook(_: nn.Module, __: object, out: Tensor) -> None:
            seen.output(number, out)

        return hook

    def on_router(owner: nn.Module, args: tuple[Any, ...]) -> None:
        weight, bias = owner._parameters["weight"], owner._parameters.get("bias")
        if weight is None:
            raise RuntimeError(f"the router {router} is not loaded")
        x = args[0].detach().reshape(-1, width).float()
        scores = x @ (weight.detach().float() if transposed else weight.detach().float().T)
        seen.scores(scores if bias is None else scores + bias.detach().float())

    handles = [gate.register_forward_pre_hook(on_router), bank.register_forward_pre_hook(on_bank)]
    handles += [bank.expert(e).down_proj.register_forward_hook(on_expert(e)) for e in range(bank.experts)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
