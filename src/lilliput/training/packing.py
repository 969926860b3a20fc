"""Whether a model keeps documents apart that share a row, where positions begin anew with each."""

from __future__ import annotations

import torch

from lilliput.anatomy.skeleton import Skeleton

_LENGTHS = (5, 4, 6)
_TOLERANCE = 1e-3  # of the size of what the head reads; two documents that see each other differ by a tenth or more


@torch.no_grad()
def leaks(skeleton: Skeleton) -> bool:
    """Runs the loaded model on three short documents in a row, and each alone."""
    rows = skeleton.shapes[skeleton.embeddings[0]][0] if skeleton.embeddings else 1
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(rows, skeleton.shapes[skeleton.head][0]), (1, sum(_LENGTHS)), generator=generator)
    positions = torch.cat([torch.arange(n) for n in _LENGTHS])[None]
    try:
        together = skeleton.read(ids, positions).float()
    except TypeError:  # its forward pass takes no positions
        return True
    at = 0
    for n in _LENGTHS:
        alone = skeleton.read(ids[:, at : at + n]).float()
        apart = (together[:, at : at + n] - alone).norm() / alone.norm()
        if not float(apart) <= _TOLERANCE:
            return True
        at += n
    return False
