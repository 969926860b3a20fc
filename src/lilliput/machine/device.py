"""What a process computes on."""

from __future__ import annotations

import torch

from lilliput.errors import PlanError
from lilliput.machine import ranks


def choose(name: str) -> str:
    """The torch device for --device `wanted`; of several processes each takes the accelerator of its number.

    Raises PlanError where there is none such.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise PlanError(f"--device {name}: this torch finds no such accelerator; use --device cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in {"cpu", "cuda"}:
        raise PlanError(f"--device {name} is not known: choose auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PlanError(f"--device {name}: there are {torch.cuda.device_count()} accelerators, counted from 0")
    if device.type == "cuda" and ranks.size() > 1:
        if device.index is not None or ranks.local() >= torch.cuda.device_count():
            raise PlanError(
                f"--device {name}: each process needs its own accelerator, and there are "
                f"{torch.cuda.device_count()}: start at most that many processes, with --device cuda"
            )
        torch.cuda.set_device(ranks.local())
        return f"cuda:{ranks.local()}"
    return name


def compute_dtype(name: str, device: str) -> torch.dtype:
    """`auto` is bfloat16 where the processor multiplies it natively, else float32."""
    if name != "auto":
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if name not in dtypes:
            raise PlanError(f"--dtype {name} is not known: choose auto, float32, bfloat16 or float16")
        return dtypes[name]
    if device != "cpu":
        return torch.bfloat16
    flags = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if flags else torch.float32
