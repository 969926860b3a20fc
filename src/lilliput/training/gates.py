"""Gates in front of what may leave a model, trained until as many are open as are to stay.

A gate z multiplies what a unit hands on. Hard concrete (Louizos et al. 2018, arXiv 1712.01312), u uniform in (0, 1):

    s = sigmoid((log u - log(1 - u) + log alpha) / beta),   z = clip(s (zeta - gamma) + gamma, 0, 1),
    P(z > 0) = sigmoid(log alpha - beta log(-gamma / zeta)),   and settled: z = clip(sigmoid(log alpha) (zeta - gamma)
    + gamma, 0, 1),

with gamma = -0.1, zeta = 1.1, beta = 2/3. Its expected number of open gates can be held to a number T of n by

    lambda d + phi d^2,   d = (sum P(z > 0) - T) / n,

minimised by weights and gates, and maximised by the multipliers lambda and phi. T goes from n to what is asked for
while targets warm up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.parts.layer import Layer
from lilliput.verbs.gated import Training
from lilliput.verbs.trained import Trained

GAMMA, ZETA, BETA = -0.1, 1.1, 2.0 / 3.0
OPEN = 3.0  # log alpha of a gate that is open for sure once settled, and for nearly all u before


def drawn(log_alpha: Tensor, u: Tensor) -> Tensor:
    """z for noise u in (0, 1), of the shape of both; differentiable by log_alpha where 0 < z < 1."""
    s = ((u.log() - (-u).log1p() + log_alpha) / BETA).sigmoid()
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def open_chance(log_alpha: Tensor) -> Tensor:
    """P(z > 0)."""
    return (log_alpha - BETA * math.log(-GAMMA / ZETA)).sigmoid()


def settled(log_alpha: Tensor) -> Tensor:
    """z without noise."""
    return (log_alpha.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


class Uphill(torch.autograd.Function):
    """The value itself; its gradient turned round, so that what descends by it climbs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        return -slopes[0]


def climbed(value: Tensor) -> Tensor:
    """See `Uphill`."""
    result: Tensor = Uphill.apply(value)  # type: ignore[no-untyped-call]
    return result


class Gates(Trained):
    """The gates of a model, float32: `log_alpha` of every kind, [blocks, units], [blocks] or [channels]."""

    def __init__(self, training: Training, adapters: Mapping[str, tuple[int, int]], seed: int) -> None:
        """adapters: (out, in) of the linears beside which low-rank changes are trained, by name."""
        super().__init__()
        self.training_of = training
        start = OPEN if training.relax == "hard-concrete" else 1.0
        self.raw = nn.ParameterDict(
            {_key(kind): nn.Parameter(torch.full(self._shape(kind, n), start)) for kind, n in training.counts.items()}
        )
        self.multipliers = nn.ParameterDict()
        if training.shape is not None:
            held = ["share"] if training.shape.share is not None else sorted(training.shape.stay)
            for name in held:
                size = training.blocks if name.startswith(("heads", "channels")) else 1
                self.multipliers[_key(name)] = nn.Parameter(torch.zeros(2, size))
        generator = torch.Generator().manual_seed(seed)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, (rows, width) in adapters.items():
            self.down[_key(name)] = nn.Parameter(
                torch.randn(training.width, width, generator=generator) / math.sqrt(width)
            )
            self.up[_key(name)] = nn.Parameter(torch.zeros(rows, training.width))
        self._noise: dict[str, Tensor] = {}
        self._done = 0.0

    def _shape(self, kind: str, count: int) -> tuple[int, ...]:
        if kind in ("block", "attention", "mlp"):
            return (self.training_of.blocks,)
        return (count,) if kind == "hidden" else (self.training_of.blocks, count)

    def rates(self) -> Mapping[str, float]:
        t = self.training_of
        rates = {f"raw.{key}": t.rate for key in self.raw}
        rates |= {f"multipliers.{key}": t.rate for key in self.multipliers}
        # Adapters move at the rate of weights.
        return rates | {f"{side}.{key}": 1.0 for side in ("down", "up") for key in self.down}

    def step(self, done: float) -> None:
        self._done = done
        if self.training_of.relax == "hard-concrete":
            tiny = torch.finfo(torch.float32).eps
            self._noise = {key: torch.rand(x.shape).clamp_(tiny, 1 - tiny).to(x.device) for key, x in self.raw.items()}

    def after_step(self, rate: float) -> None:
        if self.training_of.relax == "plain":
            with torch.no_grad():
                for x in self.raw.values():
                    x.clamp_(0.0, 1.0)

    def gate(self, kind: str, block: int | None = None) -> Tensor:
        """z of a kind (of one block), as training sees it now."""
        key = _key(kind)
        raw: Tensor = self.raw[key] if block is None else self.raw[key][block]
        if self.training_of.relax == "plain":
            return raw
        if not self._noise:
            return settled(raw)
        return drawn(raw, self._noise[key] if block is None else self._noise[key][block])

    def final(self, kind: str) -> Tensor:
        """z of a kind once training is over, float32."""
        raw = self.raw[_key(kind)].detach()
        return raw.clone() if self.training_of.relax == "plain" else settled(raw)

    def chance(self, kind: str) -> Tensor:
        """The chance that each gate of a kind is open, or, of plain gates, how far it is."""
        raw = self.raw[_key(kind)]
        return raw if self.training_of.relax == "plain" else open_chance(raw)

    def adapted(self, name: str, x: Tensor) -> Tensor | None:
        """What the adapter of a linear adds for its input x [.., in]; None where it has none."""
        key = _key(name)
        return (x @ self.down[key].T.to(x.dtype)) @ self.up[key].T.to(x.dtype) if key in self.down else None

    def change(self, name: str) -> Tensor | None:
        """What the adapter of a linear adds to its weight, [out, in]; None where it has none."""
        key = _key(name)
        return (self.up[key] @ self.down[key]).detach() if key in self.down else None

    def penalty(self) -> Tensor | None:
        t = self.training_of
        if t.shape is None:
            shares = [self.chance(kind).mean() for kind in t.counts]
            return t.penalty * torch.stack(shares).mean() if shares and t.penalty else None
        warmed = min(self._done / t.warm, 1.0) if t.warm > 0 else 1.0
        terms = []
        for name, gaps in self.gaps(warmed).items():
            linear, square = climbed(self.multipliers[_key(name)])
            terms.append((linear * gaps + square * gaps.square()).sum())
        return torch.stack(terms).sum()

    def gaps(self, warmed: float = 1.0) -> dict[str, Tensor]:
        """d of each target: how far the expected share of open gates (or of weights) is above it. warmed: how far
        targets have come."""
        t = self.training_of
        if t.shape is None:
            return {}
        if t.shape.share is not None:
            target = 1.0 - warmed * (1.0 - t.shape.share)
            return {"share": (self.expected() - target)[None]}
        found = {}
        for kind, stay in t.shape.stay.items():
            count = t.blocks if kind == "block" else t.counts[kind]
            target = (count - warmed * (count - stay)) / count
            found[kind] = self.chance(kind).mean(-1).reshape(-1) - target
        return found

    def expected(self) -> Tensor:
        """The share of the blocks' weights that is expected to stay."""
        t = self.training_of
        if t.shape is None:
            raise RuntimeError("gates that are held to nothing have no costs")
        one = next(iter(self.raw.values())).new_ones(t.blocks)
        total, left = float(t.shape.fixed), one * t.shape.fixed
        for kind, count in t.counts.items():
            if kind not in ("heads",) and not kind.startswith("channels"):
                continue
            cost = t.shape.head_cost if kind == "heads" else t.shape.channel_cost
            branch = "attention" if kind == "heads" else "mlp"
            chance = self.chance(kind).sum(-1) * cost
            left = left + (chance * self.chance(branch) if branch in t.counts else chance)
            total += cost * count
        if "block" in t.counts:
            left = left * self.chance("block")
        share = left.sum() / (t.blocks * total)
        left_of: Tensor = share * self.chance("hidden").mean() if "hidden" in t.counts else share
        return left_of

    def weight(self) -> Tensor:
        raise RuntimeError("gates are no weights of a linear")

    def finish(self) -> Layer:
        raise RuntimeError("gates are no weights of a linear")


def _key(name: str) -> str:
    """Modules allow no dots in the names of parameters."""
    return name.replace(".", "/")


Hook = Callable[..., Any]


def attach(
    gates: Gates,
    block: nn.Module,
    number: int,
    readers: Mapping[str, Mapping[str, Tensor]],
    branches: Mapping[str, str],
) -> list[Any]:
    """Put the gates of a block in front of the linears that read them; handles by which they are taken off again.

    readers: by kind, and by linear, the gate in front of each column, int64 [in], -1 for none. branches: by linear that
    writes to the stream, the kind of its branch ("attention", "mlp"). A gate of a branch or block stands there too, so
    that it can be multiplied into the linear's columns; its bias stays.
    """
    handles = []
    own = [name for name in branches if {branches[name], "block"} & gates.training_of.counts.keys()]
    linears = {name for kind, x in readers.items() if kind in gates.training_of.counts for name in x} | set(own)
    for name in sorted(linears):
        kinds = {kind: x[name] for kind, x in readers.items() if kind in gates.training_of.counts and name in x}
        hook = _before(gates, number, kinds, branches.get(name))
        handles.append(block.get_submodule(name).register_forward_pre_hook(hook))
    return handles


def _before(gates: Gates, number: int, kinds: Mapping[str, Tensor], branch: str | None) -> Hook:
    def run(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0] * columns(gates, number, kinds, branch, gates.gate).to(inputs[0].dtype), *inputs[1:])

    return run


def columns(
    gates: Gates,
    number: int,
    kinds: Mapping[str, Tensor],
    branch: str | None,
    value: Callable[..., Tensor],
) -> Tensor:
    """What multiplies each column of a linear of block `number`, [in] or of one number. value(kind, block): gates."""
    factor: Tensor = next(iter(gates.raw.values())).new_ones(())
    for kind, owner in kinds.items():
        z = value(kind, number)
        owned = owner.to(z.device)
        factor = factor * torch.where(owned >= 0, z[owned.clamp(min=0)], 1.0)
    for outer in (branch, "block"):
        if outer is not None and outer in gates.training_of.counts:
            factor = factor * value(outer, number)
    return factor


def after(gates: Gates) -> Hook:
    """A forward hook that multiplies what is written to the residual stream by its channels' gates."""

    def run(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out * gates.gate("hidden").to(out.dtype)

    return run


def beside(gates: Gates, name: str) -> Hook:
    """A forward hook that adds what an adapter gives."""

    def run(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        added = gates.adapted(name, inputs[0])
        return out if added is None else out + added

    return run
