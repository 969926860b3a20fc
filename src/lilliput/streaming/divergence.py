"""How far a model whose last block leaves other states is from the model as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.anatomy.skeleton import Skeleton
from lilliput.machine import memory
from lilliput.streaming.backward import LOGITS, Read
from lilliput.streaming.states import Activations


def head_names(skeleton: Skeleton) -> tuple[str, ...]:
    """The tensors after the last block."""
    stem = skeleton.head.rpartition(".")[0]
    return tuple(dict.fromkeys((*skeleton.final, *(n for n in skeleton.shapes if n.rpartition(".")[0] == stem))))


def divergence(skeleton: Skeleton, read: Read, states: Activations, changed: Activations) -> float:
    """Mean KL divergence in nats of the next token's distribution, over all positions: of `changed` [N, T, H] from
    `states`, both as the last block leaves them."""
    names = head_names(skeleton)
    for name in names:
        skeleton.load({name: read(name)})
    step = max(1, LOGITS // skeleton.shapes[skeleton.head][0])
    total, tokens = 0.0, 0
    with torch.no_grad():
        for n in range(len(states)):
            before, after = (skeleton.finish(x.read(n, n + 1).to(skeleton.device))[0] for x in (states, changed))
            for a in range(0, len(before), step):
                p = skeleton.logits(before[a : a + step]).float().log_softmax(-1)
                q = skeleton.logits(after[a : a + step]).float().log_softmax(-1)
                total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
            tokens += len(before)
    skeleton.unload(names)
    memory.trim()
    return total / max(tokens, 1)


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
