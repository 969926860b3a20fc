"""What a backward pass can show of the block that it is at, beside gradients: what its linears read, how much the loss
depends on gates in front of them, and the covariance of the gradients that arrive at their outputs.

A gate is a number 1 that multiplies what a head or hidden channel hands to the linear that reads it. With the columns
S of that linear's weight W the derivative of the loss by the gate is sum over S of W * dL/dW, so that the gradients by
weights of a single sample hold it and no activation has to be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.anatomy.model import Block, Linear
from lilliput.anatomy.skeleton import Skeleton
from lilliput.stats.site import SiteStats
from lilliput.streaming.collect import Collector

Gates = Mapping[str, Mapping[str, Tensor]]
"""By name of a kind of units, and by linear: the unit whose gate stands before each column, int64 [in], -1 for none."""


class Watched:
    """A loaded block while samples go through it, forward and back; use it as a context, and `sample` after each.

    gates: whose derivatives are wanted; needs: statistics of the inputs of all sites; outputs: linears of whose output
    gradients covariances are. scale: what a sample's gradients have to be multiplied by.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        number: int,
        block: Block,
        *,
        scale: float,
        gates: Gates,
        needs: frozenset[str],
        outputs: Collection[str],
    ) -> None:
        self._skeleton, self._number, self._block = skeleton, number, block
        self._prefix, self._scale, self._gates = skeleton.block_names[number], scale, gates
        self._derivatives: dict[str, list[Tensor]] = {kind: [] for kind in gates}
        self._needs = {site.name: needs for site in block.sites} if needs else {}
        sites = block.sites if needs else ()
        self._collector = Collector(skeleton, number, sites, self._needs)
        self._covariances = {
            x.name: torch.zeros(x.out_features, x.out_features, device=skeleton.device)
            for x in block.linears
            if x.name in outputs
        }
        self._rows = dict.fromkeys(self._covariances, 0)
        self._handles: list[Any] = []

    def __enter__(self) -> Watched:
        modules = self._skeleton.block(self._number)
        for tap in self._collector.taps:
            self._handles.append(tap.module.register_forward_pre_hook(self._reads(tap.site)))
        for name in self._covariances:
            self._handles.append(modules.get_submodule(name).register_forward_hook(self._gives(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def sample(self, gradients: Mapping[str, Tensor]) -> None:
        """Gradients of the block's tensors, by canonical name, of one sample; those missing are 0."""
        for kind, linears in self._gates.items():
            total = torch.zeros(1 + max(int(x.max()) for x in linears.values()), dtype=torch.float64)
            for name, owner in linears.items():
                owned = owner >= 0
                total.index_add_(0, owner[owned], self._by_column(gradients, name)[owned])
            self._derivatives[kind].append(self._scale * total)

    def gates(self) -> dict[str, Tensor]:
        """By kind, float64 [samples, units]: the derivative of each sample's loss by each gate."""
        return {kind: torch.stack(values) for kind, values in self._derivatives.items()}

    def stats(self) -> dict[str, SiteStats]:
        """The statistics that were asked for, by site. To be called once."""
        return {name: self._collector.take(name) for name in self._needs}

    def outputs(self) -> dict[str, Tensor]:
        """By linear, float32 [out, out]: the mean over tokens of g gT, with g the gradient of the sample's loss. To
        be called once."""
        return {name: total.div_(max(self._rows[name], 1)) for name, total in self._covariances.items()}

    def _by_column(self, gradients: Mapping[str, Tensor], name: str) -> Tensor:
        """The sum over rows of weight times gradient, float64 [in], on the CPU."""
        linear: Linear = self._block.linear(name)
        tensor = f"{self._prefix}.{name}.weight"
        if tensor not in gradients:  # an expert that no token chose
            return torch.zeros(linear.in_features, dtype=torch.float64)
        product = self._skeleton.tensor(tensor).detach().float() * gradients[tensor].float()
        return product.sum(1 if linear.transposed else 0, dtype=torch.float64).cpu()

    def _reads(self, site: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def run(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._collector.see(site, inputs[0].detach())

        return run

    def _gives(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def arrived(slope: Tensor) -> None:
            rows = slope.detach().reshape(-1, slope.shape[-1]).float() * self._scale
            self._covariances[name].addmm_(rows.T, rows)
            self._rows[name] += len(rows)

        def run(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(arrived)  # type: ignore[no-untyped-call]

        return run
