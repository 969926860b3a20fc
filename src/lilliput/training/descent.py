"""What descents on the outputs of a block share: their options, the samples of each step, and the loss.

The loss is the mean squared difference between the outputs of the block and those wanted of it, on the same inputs.
With `weigh` "tokens" each token's error is divided by the mean square of its output: some tokens are a hundred times
larger than the others (attention sinks) and would decide everything, although the next norm brings all tokens to the
same size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lilliput.target import Strict
from lilliput.verbs.view import FitBlock, FitIO


class DescentOptions(Strict):
    """What every descent has."""

    iters: int = Field(200, ge=0, description="steps of descent; 0 leaves the start unchanged")
    lr: float | None = Field(None, gt=0.0, description="length of the first step; none: the method's own choice")
    batch: int = Field(8, ge=1, description="samples in a step")
    seed: int = Field(0, ge=0, description="seed of the order of the samples")
    weigh: Literal["tokens", "alike"] = Field(
        "tokens",
        description="tokens: a token's error is relative to its mean square output, as a norm after it sees it",
    )


def looks(o: DescentOptions, samples: int) -> int:
    """Samples that all steps of descent look at, of so many."""
    return o.iters * min(o.batch, samples)


def batches(count: int, o: DescentOptions) -> list[list[int]]:
    """The samples of each step: every sample once before any comes again."""
    generator = torch.Generator().manual_seed(o.seed)
    batch = min(o.batch, count)
    line: list[int] = []
    out: list[list[int]] = []
    for _ in range(o.iters):
        while len(line) < batch:
            line += [n for n in torch.randperm(count, generator=generator).tolist() if n not in line[-batch:]]
        out.append(sorted(line[:batch]))
        line = line[batch:]
    return out


def losses(
    block: FitBlock,
    io: FitIO,
    weights: Mapping[str, Tensor],
    chosen: Sequence[int],
    o: DescentOptions,
    backward: float | None = None,
) -> list[float]:
    """The mean squared error of each chosen sample; with `backward`, gradients of their sum over that number."""
    out: list[float] = []
    for a in range(0, len(chosen), io.piece):
        some = chosen[a : a + io.piece]
        device = next(iter(weights.values())).device
        hidden = torch.cat([io.inputs.read(n, n + 1) for n in some]).to(device)
        targets = torch.cat([io.targets.read(n, n + 1) for n in some]).to(device)
        error = (block.run(weights, hidden) - targets).square().mean(2)
        if o.weigh == "tokens":
            error = error / targets.square().mean(2).clamp_(min=1e-12)
        each = error.mean(1)
        if backward is not None:
            (each.sum() / backward).backward()  # type: ignore[no-untyped-call]
        out += each.detach().tolist()
    return out
