"""One block's work order, and how a finished linear leaves it: tensors to store, a row to report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lilliput import export, lockstep
from lilliput.anatomy.model import Block, Site
from lilliput.model import Model
from lilliput.parts.layer import Layer
from lilliput.plan import Plan
from lilliput.resolve import LinearPlan
from lilliput.stats import fold
from lilliput.stats.site import SiteStats
from lilliput.weights import BlockWeights

Rows = list[dict[str, Any]]
_CHUNK = 1 << 21  # weights whose error is measured at a time


@dataclass(frozen=True)
class BlockJob:
    """What compressing one block needs to know; the fields do not change while it runs."""

    plan: Plan
    model: Model
    index: int
    anatomy: Block
    weights: BlockWeights
    exporter: export.Exporter
    fisher: Path | None = None  # squared gradients, where a step reads them

    @property
    def plans(self) -> dict[str, LinearPlan]:
        return {x.linear.name: x for x in self.plan.resolved.of_block(self.index)}

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset().union(*(task.needs for name in site.linears for task in self.plans[name].alone))

    def tap(self, site: Site) -> lockstep.Tap:
        block = self.model.skeleton.block(self.index)
        return lockstep.Tap(site.name, block.get_submodule(site.linears[0]))


def _error(weight: Tensor, decoded: Tensor, stats: SiteStats | None, rough: bool) -> tuple[float, str]:
    """Relative error of a finished layer: of its outputs where the Gram matrix is known, else of its weights.

    `rough`: the outputs' whole energy, a sum without cancellation, may round its factors to bfloat16.
    """
    gram = stats.gram if stats is not None and stats.count else None
    lost = whole = 0.0
    step = max(1, _CHUNK // weight.shape[1])
    for a in range(0, len(weight), step):
        some = weight[a : a + step]
        change = decoded[a : a + step] - some
        if gram is None:
            lost += float(change.square().sum())
            whole += float(some.square().sum())
            continue
        lost += float((change @ gram).mul_(change).sum())
        with fold.reduced_products(rough):
            whole += float((some @ gram).mul_(some).sum())
    ratio = (max(lost, 0.0) / whole) ** 0.5 if whole > 0 else 0.0
    return ratio, "weight" if gram is None else "output"


def _stored(job: BlockJob, plan: LinearPlan, layer: Layer) -> dict[str, Tensor]:
    packed = job.exporter.pack(job.plan.outcomes[plan.name], layer)
    return {name: value.cpu().contiguous() for name, value in packed.items()}


def install(job: BlockJob, plan: LinearPlan, decoded: Tensor) -> None:
    job.model.skeleton.load({f"{plan.name}.weight": job.weights.to_stored(plan.linear, decoded)})


def deliver(
    job: BlockJob, plan: LinearPlan, layer: Layer, stats: SiteStats, seconds: float
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A finished layer's tensors and its row; the block's module takes it over."""
    decoded = layer.decode()
    if layer.parts and not plan.scheme.parts:  # a plain tensor holds what its type can
        decoded = decoded.to(job.plan.outcomes[plan.name].dtype).float()
    error, of = _error(layer.weight, decoded, stats, job.plan.dtype is torch.bfloat16)
    stored = _stored(job, plan, layer)
    install(job, plan, decoded)
    return stored, {
        "name": plan.name,
        "methods": [task.method.name for task in plan.tasks],
        "bits": 8 * sum(t.numel() * t.element_size() for t in stored.values()) / plan.linear.parameters,
        "error": error,
        "error_of": of,
        "zeros": float((decoded == 0).float().mean()),
        "tokens": stats.count,
        "seconds": seconds,
    }
