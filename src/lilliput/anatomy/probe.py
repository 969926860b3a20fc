"""Run one random-weight block with changed tensors and look at what its modules see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.anatomy.calls import Calls
from lilliput.anatomy.experts import UnrolledExperts
from lilliput.anatomy.skeleton import Skeleton
from lilliput.errors import SourceError

BATCH, TOKENS = 32, 4  # many first tokens: a channel after a ReLU must be seen alive
CHANGED = 1e-7  # relative; runs are repeatable, so what nothing touches stays the same to the last bit


@dataclass(frozen=True)
class Found:
    """A linear seen in the module tree of a block (name relative to the block)."""

    name: str
    out_features: int
    in_features: int
    bias: bool
    transposed: bool
    router: bool
    expert: int | None
    family: str  # the name with the expert's number left out: experts are alike


@dataclass(frozen=True)
class Seen:
    """One run: inputs by linear [.., in], outputs by linear, norms' inputs and outputs, the block's output.

    `keys` tells which inputs are one and the same tensor; `order` lists linears as they ran; `chosen`: experts
    that each token used, 0 where there are none.
    """

    inputs: Mapping[str, Tensor]
    keys: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, Tensor]
    norms: Mapping[str, tuple[Tensor, Tensor]]
    order: tuple[str, ...]
    out: Tensor
    chosen: int = 0


class Probe:
    """A block with random weights, an input, and runs under changes. Raises SourceError where the block cannot run."""

    def __init__(self, skeleton: Skeleton, index: int, seed: int) -> None:
        self.skeleton = skeleton
        self.index = index
        self.prefix = skeleton.block_names[index] + "."
        self.block = skeleton.block(index)
        self.rng = torch.Generator().manual_seed(seed)
        self.linears, self.norms, self.strange = _find(self.block)
        self.tensors = {n: self._random(n) for n in skeleton.names_of(index)}
        skeleton.load(self.tensors)
        self.tokens = min(TOKENS, skeleton.positions or TOKENS)
        self.batch = BATCH
        self.hidden = torch.empty(0)
        self.calls = Calls((0, 0), ())
        self.base = self._first()

    def close(self) -> None:
        self.skeleton.unload(self.tensors)

    def look(self, changes: Mapping[str, Tensor] | None = None, hidden: Tensor | None = None) -> Seen:
        """Run with some tensors replaced (names relative to the block), put back afterwards."""
        changes = changes or {}
        self.skeleton.load({self.prefix + n: v for n, v in changes.items()})
        try:
            return self._run(self.hidden if hidden is None else hidden)
        finally:
            self.skeleton.load({self.prefix + n: self.tensors[self.prefix + n] for n in changes})

    def tensor(self, name: str) -> Tensor:
        """A tensor of the block by its name relative to the block."""
        return self.tensors[self.prefix + name]

    def has(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def rows(self, name: str, factor: Tensor) -> dict[str, Tensor]:
        """The linear's rows and bias times factor [out]."""
        weight = self.tensor(f"{name}.weight")
        scaled = {f"{name}.weight": weight * (factor if self.linears[name].transposed else factor[:, None])}
        if self.linears[name].bias:
            scaled[f"{name}.bias"] = self.tensor(f"{name}.bias") * factor
        return scaled

    def columns(self, name: str, factor: Tensor) -> dict[str, Tensor]:
        """The linear's input channels times factor [in]."""
        weight = self.tensor(f"{name}.weight")
        return {f"{name}.weight": weight * (factor[:, None] if self.linears[name].transposed else factor)}

    def noise(self, name: str, mask: Tensor) -> dict[str, Tensor]:
        """Rows in mask [out] replaced by others."""
        weight = self.tensor(f"{name}.weight")
        fresh = (
            torch.randn(weight.shape, generator=self.rng, dtype=weight.dtype) / self.linears[name].in_features ** 0.5
        )
        keep = mask if self.linears[name].transposed else mask[:, None]
        return {f"{name}.weight": torch.where(keep, fresh, weight)}

    def uniform(self, size: int) -> Tensor:
        """Random positive factors in [1/2, 2], all different and none near 1, so that each shows; their logarithms are
        evenly apart on either side."""
        spread = 2 * (torch.randperm(size, generator=self.rng) + 0.25) / size - 1
        return torch.exp2((spread.sign() * 0.25 + 0.75 * spread).to(self.skeleton.dtype))

    def error(self, run: Seen, expected: Tensor | None = None) -> float:
        """Relative change of the block's output: Frobenius norms."""
        base = self.base.out if expected is None else expected
        if not torch.isfinite(run.out).all():
            return float("inf")
        added = base - self.hidden  # the residual alone would hide what the block itself does
        return float((run.out - base).norm() / added.norm().clamp_min(torch.finfo(base.dtype).tiny))

    def per_token(self, x: Tensor) -> Tensor | None:
        """x [.., width] as [batch, tokens, width], or None where it holds only some tokens (an expert's input)."""
        if x.numel() != self.batch * self.tokens * x.shape[-1]:
            return None
        return x.reshape(self.batch, self.tokens, -1)

    def early(self, x: Tensor) -> Tensor:
        """Rows of x at the first token: there attention gives the token's own value, whatever the queries and keys."""
        whole = self.per_token(x)
        return x.reshape(-1, x.shape[-1]) if whole is None else whole[:, 0]

    def _random(self, name: str) -> Tensor:
        shape = self.skeleton.shapes[name]
        value = torch.randn(shape, generator=self.rng, dtype=torch.float32)
        if name.endswith("norm.weight") or (len(shape) == 1 and name.endswith("weight")):
            value = 1 + 0.2 * value
        elif len(shape) < 2:
            value = 0.1 * value
        else:
            linear = self.linears.get(name.removeprefix(self.prefix).removesuffix(".weight"))
            value = value / (linear.in_features if linear else shape[-1]) ** 0.5
        return value.to(self.skeleton.dtype_of(name))

    def _first(self) -> Seen:
        """A run in which every expert gets tokens: with a larger batch where the first are too few."""
        while True:
            shape = (self.batch, self.tokens, self.skeleton.hidden_size)
            self.hidden = torch.randn(shape, generator=self.rng, dtype=self.skeleton.dtype)
            self.calls = self.skeleton.calls(self.batch, self.tokens)
            run = self._run(self.hidden)
            if all(f.name in run.inputs for f in self.linears.values() if f.expert is not None) or self.batch >= 1024:
                break
            self.batch *= 4
        if not bool(torch.isfinite(run.out).all()):
            raise SourceError(f"block '{self.prefix[:-1]}' gives numbers that are not finite for random weights")
        return run

    def _run(self, hidden: Tensor) -> Seen:
        inputs: dict[str, Tensor] = {}
        keys: dict[str, tuple[int, ...]] = {}
        outputs: dict[str, Tensor] = {}
        norms: dict[str, tuple[Tensor, Tensor]] = {}
        order: list[str] = []
        chosen: list[int] = []
        alive: list[Tensor] = []  # a freed tensor's address would be used again

        def on_linear(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
                x = args[0]
                alive.append(x)
                keys[name] = (x.data_ptr(), x.numel(), x._version)
                inputs[name] = x.clone()
                order.append(name)
                if isinstance(out, Tensor):
                    outputs[name] = out.clone()

            return hook

        def on_norm(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
                if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
                    norms[name] = (args[0].clone(), out.clone())

            return hook

        handles = [self.block.get_submodule(n).register_forward_hook(on_linear(n)) for n in self.linears]
        handles += [self.block.get_submodule(n).register_forward_hook(on_norm(n)) for n in self.norms]
        banks = [m for m in self.block.modules() if isinstance(m, UnrolledExperts)]
        handles += [m.register_forward_pre_hook(lambda _, args: chosen.append(args[1].shape[-1])) for m in banks]
        try:
            with torch.no_grad():
                out = self.skeleton.run(self.index, hidden.clone(), self.calls)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise SourceError(f"block '{self.prefix[:-1]}' cannot be run by itself: {error}") from error
        finally:
            for handle in handles:
                handle.remove()
        return Seen(inputs, keys, outputs, norms, tuple(order), out.clone(), max(chosen, default=0))


def differs(a: Tensor, b: Tensor) -> bool:
    """Whether what a site saw has changed."""
    return a.shape != b.shape or float((a - b).abs().max()) > CHANGED * float(b.abs().max())


def changed_channels(a: Tensor, b: Tensor) -> Tensor:
    """Which channels (last dimension) differ anywhere, bool [width]."""
    scale = b.abs().max()
    return (a - b).abs().reshape(-1, a.shape[-1]).amax(0) > CHANGED * scale


def _find(block: nn.Module) -> tuple[dict[str, Found], tuple[str, ...], tuple[str, ...]]:
    """Linears, norms (modules with a 1-D weight), and other modules that hold weights."""
    from transformers.pytorch_utils import Conv1D

    banks = {n: m for n, m in block.named_modules() if isinstance(m, UnrolledExperts)}
    linears: dict[str, Found] = {}
    norms: list[str] = []
    strange: list[str] = []
    for name, module in block.named_modules():
        weight = module._parameters.get("weight")
        own = [k for k, v in module._parameters.items() if v is not None]
        if not own:
            continue
        if weight is not None and weight.dim() == 1:
            norms.append(name)
            continue
        parent = name.rpartition(".")[0]
        siblings = [m.experts for n, m in banks.items() if n.rpartition(".")[0] == parent]
        router = weight is not None and weight.dim() == 2 and weight.shape[0] in siblings
        if weight is None or not (isinstance(module, nn.Linear | Conv1D) or router):
            strange.append(name)
            continue
        transposed = isinstance(module, Conv1D)
        out, width = (weight.shape[1], weight.shape[0]) if transposed else weight.shape
        bank = next((n for n in banks if name.startswith(f"{n}.")), None)
        inner = name.removeprefix(f"{bank}.")
        expert = int(inner.partition(".")[0]) if bank is not None else None
        family = name if bank is None else f"{bank}.*.{inner.partition('.')[2]}"
        bias = module._parameters.get("bias") is not None
        linears[name] = Found(name, out, width, bias, transposed, router, expert, family)
    return linears, tuple(norms), tuple(strange)
