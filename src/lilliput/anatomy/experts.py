"""Experts that transformers stores as 3-D tensors, seen as the separate linears that they are."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOLERANCE = 1e-5


class Expert(nn.Module):
    """One expert: down(act(gate(x)) * up(x)). The activation belongs to the parent, so that it is not repeated."""

    def __init__(self, hidden: int, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False, device="meta", dtype=dtype)
        self.up_proj = nn.Linear(hidden, inner, bias=False, device="meta", dtype=dtype)
        self.down_proj = nn.Linear(inner, hidden, bias=False, device="meta", dtype=dtype)


class UnrolledExperts(nn.Module):
    """The same function as transformers' experts modules with `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I].

    Called with hidden [N, H], indices [N, k] and weights [N, k] of the chosen experts; an index equal to the number of
    experts means none. An expert that no token chose does not run.
    """

    def __init__(self, experts: int, hidden: int, inner: int, act: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.experts = experts
        self.act_fn = act
        for e in range(experts):
            self.add_module(str(e), Expert(hidden, inner, dtype))

    def expert(self, e: int) -> Expert:
        module = self._modules[str(e)]
        if not isinstance(module, Expert):
            raise TypeError(f"expert {e} was replaced by {type(module).__name__}")
        return module

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for e in range(self.experts):
            token, slot = torch.where(indices == e)
            if token.numel() == 0:
                continue
            expert = self.expert(e)
            x = hidden[token]
            y = expert.down_proj(self.act_fn(expert.gate_proj(x)) * expert.up_proj(x))
            out.index_add_(0, token, (y * weights[token, slot, None]).to(out.dtype))
        return out


def unroll(module: nn.Module) -> UnrolledExperts | None:
    """The unrolled form of an experts module, or None where its function is not the known one.

    Whether it is gets decided by running a copy of the module with small random tensors beside the unrolled form.
    """
    gate_up, down = module._parameters.get("gate_up_proj"), module._parameters.get("down_proj")
    if gate_up is None or down is None or set(module._parameters) != {"gate_up_proj", "down_proj"}:
        return None
    act = getattr(module, "act_fn", None)
    if gate_up.dim() != 3 or down.dim() != 3 or not callable(act) or module._buffers:
        return None
    experts, hidden, inner = down.shape
    if gate_up.shape != (experts, 2 * inner, hidden) or not _same_function(module, experts, hidden, inner, act):
        return None
    return UnrolledExperts(experts, hidden, inner, act, down.dtype)


def split_gate_up(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """gate [I, H] and up [I, H] of one expert's `gate_up_proj` [2I, H]."""
    gate, up = gate_up.chunk(2, dim=0)
    return gate, up


def is_batched(module: nn.Module) -> bool:
    """Whether a module holds 3-D parameters of its own, as experts do; a single one is told by its names."""
    held = {name: p for name, p in module._parameters.items() if p is not None and p.dim() == 3}
    return any(p.shape[0] > 1 for p in held.values()) or held.keys() == {"gate_up_proj", "down_proj"}


def _same_function(module: nn.Module, experts: int, hidden: int, inner: int, act: nn.Module) -> bool:
    h, i = 8, 4
    count = min(experts, 5)
    rng = torch.Generator().manual_seed(0)
    small = copy.copy(module)
    for name, value in list(vars(module).items()):
        if isinstance(value, int) and not isinstance(value, bool):
            setattr(small, name, {experts: count, hidden: h, inner: i, 2 * inner: 2 * i}.get(value, value))
    for name, value in (("num_experts", count), ("hidden_dim", h), ("intermediate_dim", i)):
        if hasattr(module, name):  # set by name as well: sizes may coincide
            setattr(small, name, value)
    config: Any = getattr(module, "config", None)
    if hasattr(config, "_experts_implementation"):
        config = copy.copy(config)
        config._experts_implementation = "eager"  # the plain loop: the batched kernels ask for aligned widths
        small.__dict__["config"] = config
    gate_up = torch.randn(count, 2 * i, h, generator=rng)
    down = torch.randn(count, h, i, generator=rng)
    small._parameters = {"gate_up_proj": nn.Parameter(gate_up), "down_proj": nn.Parameter(down)}
    mine = UnrolledExperts(count, h, i, act, torch.float32).to_empty(device="cpu")
    x = torch.randn(16, h, generator=rng)
    top = min(2, count)
    indices = torch.rand(16, count, generator=rng).argsort(1)[:, :top]
    weights = torch.rand(16, top, generator=rng)
    with torch.no_grad():
        for e in range(count):
            gate, up = split_gate_up(gate_up[e])
            mine.expert(e).gate_proj.weight.copy_(gate)
            mine.expert(e).up_proj.weight.copy_(up)
            mine.expert(e).down_proj.weight.copy_(down[e])
        try:
            theirs = small(x, indices, weights)
            ours = mine(x, indices, weights)  # an activation may take gate and up at once
        except (TypeError, RuntimeError, AttributeError, IndexError, ValueError):
            return False
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
        return False
    return bool(F.mse_loss(theirs, ours).sqrt() <= TOLERANCE * theirs.square().mean().sqrt())
