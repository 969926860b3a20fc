"""What a process computes on."""

from __future__ import annotations

import torch

from lilliput.errors import PlanError
from lilliput.machine import ranks


def choose(wanted: str) -> str:
    """The torch device for --device `wanted`; of several processes each takes the accelerator of its number.

    Raises PlanError where there is none such.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise PlanError(f"--device {wanted}: this torch finds no such accelerator; use --device cpu")
    try:
        found = torch.device(wanted)
    except RuntimeError:
        found = None
    if found is None or found.type not in {"cpu", "cuda"}:
        raise PlanError(f"--device {wanted} is not known: choose auto, cpu or cuda")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise PlanError(f"--device {wanted}: there are {torch.cuda.device_count()} accelerators, counted from 0")
    if found.type == "cuda" and ranks.size() > 1:
        if found.index is not None or ranks.local() >= torch.cuda.device_count():
            raise PlanError(
                f"--device {wanted}: each process needs its own accelerator, and there are "
                f"{torch.cuda.device_count()}: start at most that many processes, with --device cuda"
            )
        torch.cuda.set_device(ranks.local())
        return f"cuda:{ranks.local()}"
    return wanted
