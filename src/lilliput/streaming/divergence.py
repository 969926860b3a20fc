"""How far models whose last block leaves other states are from the model as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lilliput.anatomy.skeleton import Skeleton
from lilliput.machine import memory
from lilliput.streaming.backward import LOGITS, Read
from lilliput.streaming.states import Activations
from lilliput.streaming.variants import Variants


def head_names(skeleton: Skeleton) -> tuple[str, ...]:
    """The tensors after the last block."""
    stem = skeleton.head.rpartition(".")[0]
    return tuple(dict.fromkeys((*skeleton.final, *(n for n in skeleton.shapes if n.rpartition(".")[0] == stem))))


def divergences(skeleton: Skeleton, read: Read, variants: Variants, first: Sequence[int] | None = None) -> list[float]:
    """For each variant but the first, the mean KL divergence in nats of the next token's distribution from that of the
    first, over all positions, or from position `first` of each variant on; states [rows, T, H] are as the last block
    leaves them."""
    names = head_names(skeleton)
    for name in names:
        skeleton.load({name: read(name)})
    step = max(1, LOGITS // skeleton.shapes[skeleton.head][0])
    totals = [0.0] * (variants.count - 1)
    counts = [0] * (variants.count - 1)
    begins = [0] * (variants.count - 1) if first is None else first

    def finished(variant: int, sample: int) -> Tensor:
        return skeleton.finish(variants.read(variant, sample).to(skeleton.device))[0]

    with torch.no_grad():
        for n in range(variants.samples):
            before = finished(0, n)
            for a in range(0, len(before), step):
                p = skeleton.logits(before[a : a + step]).float().log_softmax(-1)
                weights = p.exp()
                for v in range(1, variants.count):
                    q = skeleton.logits(finished(v, n)[a : a + step]).float().log_softmax(-1)
                    told = (weights * (p - q))[max(begins[v - 1] - a, 0) :]
                    totals[v - 1] += float(told.sum(dtype=torch.float64))
                    counts[v - 1] += len(told)
    skeleton.unload(names)
    memory.trim()
    return [x / max(count, 1) for x, count in zip(totals, counts, strict=True)]


def spread(skeleton: Skeleton, read: Read, states: Activations) -> Tensor:
    """The mean over tokens of p_v (1 - p_v), float32 [vocabulary], for `states` as the last block leaves them."""
    names = head_names(skeleton)
    for name in names:
        skeleton.load({name: read(name)})
    vocabulary = skeleton.shapes[skeleton.head][0]
    step = max(1, LOGITS // vocabulary)
    total = torch.zeros(vocabulary, device=skeleton.device)
    tokens = 0
    with torch.no_grad():
        for n in range(len(states)):
            finished = skeleton.finish(states.read(n, n + 1).to(skeleton.device))[0]
            for a in range(0, len(finished), step):
                p = skeleton.logits(finished[a : a + step]).float().softmax(-1)
                total += (p - p.square()).sum(0)
            tokens += len(finished)
    skeleton.unload(names)
    memory.trim()
    return total / max(tokens, 1)
