"""One block's work order, and how a finished linear leaves it: tensors to store, a row to report."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lilliput import export
from lilliput.anatomy.model import Block, Site
from lilliput.errors import LilliputError
from lilliput.machine import ranks
from lilliput.model.block import BlockWeights
from lilliput.model.weights import Model
from lilliput.parts import transform
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.layer import Layer
from lilliput.plan.plan import Plan
from lilliput.plan.resolve import LinearPlan
from lilliput.run.repairing import Teacher
from lilliput.runtime import inputs
from lilliput.stats import fold
from lilliput.stats.site import SiteStats

Rows = list[dict[str, Any]]
_CHUNK = 1 << 21  # weights whose error is measured at a time
_SHARES = (1.0, 1 - 2**-6, 0.875, 0.75, 0.5, 0.25)  # of the range of the model's type, that weights may fill
_FITTED = 0.875
_WIDE = 1e38


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
    slopes: Path | None = None  # gradients by what the block gives, where a step weighs what it stores by them
    teacher: Teacher | None = None  # the unedited model, where a step repairs the edited one

    @property
    def plans(self) -> dict[str, LinearPlan]:
        return {x.linear.name: x for x in self.plan.resolved.of_block(self.index)}

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset().union(*(task.needs for name in site.linears for task in self.plans[name].alone))


def within(layer: Layer, dtype: torch.dtype, solve: Callable[[Layer], Layer]) -> Layer:
    """What `solve` makes of a layer, so that it decodes to numbers of `dtype`, in which engines hold it.

    The value nearest to a weight at the top of float16 may lie beyond it. Such weights are shown to `solve` a little
    smaller, until all that it returns is finite. Raises LilliputError where a quarter of the range is too much.
    """
    top = torch.finfo(dtype).max
    if top > _WIDE:  # the range of float32
        return solve(layer)
    for share in _SHARES:
        clipped = layer if share == 1.0 else replace(layer, weight=layer.weight.clamp(-share * top, share * top))
        solved = solve(clipped)
        if fits(solved.decode(), dtype):
            return replace(solved, weight=layer.weight) if solved.weight is clipped.weight else solved
    raise overflow(layer.name, dtype)


def lowered(layer: Layer, dtype: torch.dtype) -> Layer:
    """A layer for a fit, which may move a code by one: its weights fill 7/8 of the range of `dtype` at most."""
    top = torch.finfo(dtype).max
    return layer if top > _WIDE else replace(layer, weight=layer.weight.clamp(-_FITTED * top, _FITTED * top))


def fits(decoded: Tensor, dtype: torch.dtype) -> bool:
    """Whether every number is one of `dtype`, found without a copy."""
    low, high = torch.aminmax(decoded)
    return bool(torch.isfinite(torch.stack([low, high]).to(dtype)).all())


def overflow(name: str, dtype: torch.dtype) -> LilliputError:
    """The one message for numbers that the model's own dtype does not have."""
    kind = str(dtype).removeprefix("torch.")
    return LilliputError(
        f"{name} would decode to numbers beyond {kind}, in which the model is stored: exclude this layer from the "
        "steps that compress it, or convert the model to bfloat16 first"
    )


def _energy(x: Tensor, gram: Tensor | None) -> float:
    """Sum of squares of x [rows, in], or of its outputs; in float64 where float32 overflows."""
    energy = float(x.square().sum() if gram is None else (x @ gram).mul_(x).sum())
    if math.isfinite(energy):
        return energy
    return _energy(x.double(), None if gram is None else gram.double()) if x.dtype != torch.float64 else energy


def energies(change: Tensor, weight: Tensor, gram: Tensor | None, rough: bool = False) -> tuple[float, float]:
    """Energy of a change [rows, in] and of the weight itself: of the outputs where the Gram matrix is known."""
    loss = _energy(change, gram)
    with fold.reduced_products(rough and gram is not None):
        return loss, _energy(weight, gram)


def relative(loss: float, whole: float) -> float:
    """A relative error from energies; 0 where there is nothing to lose."""
    return float((max(loss, 0.0) / whole) ** 0.5) if whole > 0 else 0.0


def _error(weight: Tensor, decoded: Tensor, stats: SiteStats | None, rough: bool) -> tuple[float, str]:
    """Relative error of a finished layer: of its outputs where the Gram matrix is known, else of its weights.

    `rough`: the outputs' whole energy, a sum without cancellation, may round its factors to bfloat16.
    """
    gram = stats.gram if stats is not None and stats.count else None
    loss = whole = 0.0
    step = max(1, _CHUNK // weight.shape[1])
    for a in range(0, len(weight), step):
        some = weight[a : a + step]
        lost_here, whole_here = energies(decoded[a : a + step] - some, some, gram, rough)
        loss, whole = loss + lost_here, whole + whole_here
    return relative(loss, whole), "weight" if gram is None else "output"


def _stored(job: BlockJob, plan: LinearPlan, layer: Layer) -> dict[str, Tensor]:
    packed = job.exporter.pack(job.plan.outcomes[plan.name], layer)
    return {name: value.cpu().contiguous() for name, value in packed.items()}


def install(job: BlockJob, plan: LinearPlan, decoded: Tensor, layer: Layer) -> None:
    """Let the block's module take over a layer: its weight, and how it rounds its inputs."""
    job.model.skeleton.load({f"{plan.name}.weight": job.weights.to_stored(plan.linear, decoded)})
    if layer.activation is not None:
        inputs.attach(module_of(job, plan), inputs.Rounding(layer.activation, layer.inputs))


def module_of(job: BlockJob, plan: LinearPlan) -> nn.Module:
    """The module of a linear in the loaded block."""
    return job.model.skeleton.block(job.index).get_submodule(plan.linear.name)


def deliver(
    job: BlockJob, plan: LinearPlan, layer: Layer, stats: SiteStats, seconds: float
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A finished layer's tensors and its row; the block's module takes it over.

    Raises LilliputError where it decodes to numbers that the model's own dtype does not have.
    """
    decoded = layer.decode()
    dtype = job.plan.outcomes[plan.name].dtype
    if not fits(decoded, dtype):
        raise overflow(plan.name, dtype)
    if layer.parts and not plan.scheme.parts:  # a plain tensor holds what its type can
        decoded = decoded.to(dtype).float()
    error, of = _error(layer.weight, decoded, stats, job.plan.dtype is torch.bfloat16)
    stored = _stored(job, plan, layer)
    install(job, plan, decoded, layer)
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


def same_inputs(job: BlockJob, plan: LinearPlan) -> None:
    """All ranks round the inputs of a linear as the leader does."""
    activation = plan.scheme.activation
    if activation is None:
        return
    module, width = module_of(job, plan), plan.linear.in_features
    own = inputs.of(module)
    packed = {} if own is None else own.grid.pack() | transform.pack("in", own.transforms)
    shapes = activation.stored(width) | transform.names("in", plan.scheme.inputs, width)
    tensors = {
        name: ranks.same(packed.get(name, torch.empty(shape, dtype=dtype))) for name, (dtype, shape) in shapes.items()
    }
    if own is None:
        grid = InputGrid(activation, {suffix: tensors[suffix] for suffix in activation.stored(width)})
        turned = transform.load("in", plan.scheme.inputs, width, tensors.__getitem__)
        inputs.attach(module, inputs.Rounding(grid, turned))
