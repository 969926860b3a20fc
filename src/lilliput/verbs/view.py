"""What a step sees of a block: its anatomy, its weights, what calibration saw at its sites, and how to run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lilliput.anatomy.model import Block
from lilliput.folds.kinds import Fold
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.streaming.states import Activations


@dataclass(frozen=True)
class BlockView:
    """A block's description, its linears' weights by name, float32 [out, in] (Conv1D weights already turned), and the
    gains of the norms that its links begin with, float32 [width]."""

    anatomy: Block
    weights: Mapping[str, Tensor]
    gains: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockIO:
    """Statistics by site name, as collected before this step changes anything.

    `squares(linear)`: squared gradients float32 [out, in], read from disk; None where the step asks for none.
    `movement(weights)`: how far the block's output moves with `weights` [out, in], by linear, in place of the linears'
    own: the mean over tokens of |change|^2 / |output|^2, on two calibration samples; None without calibration.
    """

    stats: Mapping[str, SiteStats]
    squares: Callable[[str], Tensor] | None = None
    movement: Callable[[Mapping[str, Tensor]], float] | None = None


Run = Callable[[Mapping[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class FitBlock:
    """A block to be fitted as a whole.

    `layers`: the linears that the step covers, by name, each with the support and parts that earlier steps gave it.
    `run(weights, hidden)`: the block's outputs float32 [n, tokens, hidden] for inputs of that shape, with `weights`
    [out, in] in place of these linears' own and everything else as it is now; gradients reach `weights` alone. A
    vector among them, under its full name ("norm.weight", "q_proj.bias"), takes the place of that tensor. `vectors`:
    the block's own gains and biases by such names, float32.
    """

    anatomy: Block
    layers: Mapping[str, Layer]
    run: Run
    vectors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class FitIO:
    """What the block gets and what it should give.

    `stats`: "square" of the sites' inputs in the uncompressed block; `inputs`: what the compressed blocks before it
    give, [samples, tokens, hidden]; `targets`: the uncompressed block's outputs for these inputs, float32; `piece`:
    samples that fit into memory with their gradients.
    """

    stats: Mapping[str, SiteStats]
    inputs: Activations
    targets: Activations
    piece: int


@dataclass(frozen=True)
class BlockFit:
    """What a fit made of a block: its layers by name, and the block's loss before and after, as fits measure it.

    `folds`: what it has moved between them and what comes before, in order; the weights of `layers` are already those
    after the folds, and no linear of another step is touched by one.
    """

    layers: Mapping[str, Layer]
    start: float
    end: float
    folds: Sequence[Fold] = ()
