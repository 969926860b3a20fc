"""Devices as a roofline sees them: peak arithmetic, memory bandwidth, memory. Named ones from devices.yaml; this one
measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources

import torch
from ruamel.yaml import YAML

from lilliput.efficiency.serving import ARITHMETIC, Runtime
from lilliput.errors import PlanError, nearest
from lilliput.runtime.cache import CachedModel

THIS = "this-cpu"
_HALF = ("bf16", "fp16", "fp32")
_WIDER = {"int8": _HALF, "fp8": _HALF, "bf16": ("fp32",), "fp16": ("fp32",)}
_LONG = 2.0  # seconds: what comes between runs is little beside that
Clock = Callable[[], float]


@dataclass(frozen=True)
class Device:
    """name: as in devices.yaml; title: as a sentence says it; peaks: FLOP/s (int8: OP/s) by arithmetic ("fp32", "bf16",
    "fp16", "fp8", "int8"); bandwidth: bytes/s; memory: bytes; runtime: what serves models on it, see
    `lilliput.efficiency.serving.servings`; overhead: seconds that a pass takes whatever its size, once and for each
    block (Python, launches of operators): nothing for a perfect engine."""

    name: str
    title: str
    peaks: Mapping[str, float] = field(hash=False)
    bandwidth: float
    memory: float
    runtime: Runtime = "kernels"
    overhead: tuple[float, float] = (0.0, 0.0)

    def arithmetic(self, kind: str) -> str:
        """The arithmetic that a product runs in: the wanted one, else what engines widen its operands to."""
        for name in (kind, *_WIDER.get(kind, ())):
            if name in self.peaks:
                return name
        raise PlanError(f"{self.name} has no peak for {kind} arithmetic: known are {', '.join(self.peaks)}")


def devices() -> tuple[Device, ...]:
    """The named devices of devices.yaml, in its order."""
    text = resources.files("lilliput.efficiency").joinpath("devices.yaml").read_text(encoding="utf-8")
    return tuple(
        Device(
            name,
            str(x["title"]),
            {k: float(v) for k, v in x["peaks"].items()},
            float(x["bandwidth"]),
            float(x["memory"]),
        )
        for name, x in YAML(typ="safe", pure=True).load(text).items()
    )


def device(name: str) -> Device:
    """A device by name; "this-cpu" is measured now. Raises PlanError with the nearest name."""
    if name == THIS:
        return measure_device()
    by_name = {x.name: x for x in devices()}
    if name not in by_name:
        raise PlanError(f"unknown device '{name}': one of {', '.join(by_name)}, {THIS}.{nearest(name, by_name)}")
    return by_name[name]


def measure_device(
    *, side: int = 1536, buffer: int = 1 << 29, repeats: int = 5, clock: Clock = time.perf_counter
) -> Device:
    """This machine's CPU with torch's present number of threads, in about ten seconds.

    Arithmetic: the best of `repeats` products of two square matrices of `side`, in float32 and bfloat16. Bandwidth:
    the best of `repeats` sums over `buffer` bytes of float32 and as many copies, bytes read and written counted (as in
    STREAM, McCalpin 1995), whichever is faster; a buffer well beyond the caches, or it measures them. Memory: physical.
    Overhead: of decoding steps of transformers, see `pass_overhead`.
    """
    import psutil

    peaks = {
        ARITHMETIC[x]: matmul_peak(x, side=side, repeats=repeats, clock=clock) for x in (torch.float32, torch.bfloat16)
    }
    memory = float(psutil.virtual_memory().total)
    threads = torch.get_num_threads()
    title = f"this CPU ({threads} thread{'s' if threads > 1 else ''})"
    bandwidth = memory_bandwidth(buffer, repeats=repeats, clock=clock)
    overhead = pass_overhead(repeats=4 * repeats, clock=clock)
    return Device(THIS, title, peaks, bandwidth, memory, runtime="transformers", overhead=overhead)


def matmul_peak(
    dtype: torch.dtype,
    *,
    side: int = 1536,
    repeats: int = 5,
    where: str = "cpu",
    clock: Clock = time.perf_counter,
) -> float:
    """FLOP/s of a square matrix product [side, side] in `dtype` on a torch device: the best of `repeats`."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(side, side, generator=generator).to(dtype).to(where)
    return 2 * side**3 / _best(lambda: a @ a, where, repeats, clock)


def memory_bandwidth(buffer: int, *, repeats: int = 5, where: str = "cpu", clock: Clock = time.perf_counter) -> float:
    """Bytes/s: the better of summing `buffer` bytes of float32 and of copying them."""
    a = torch.zeros(buffer // 4, device=where).fill_(1.0)
    b = torch.zeros_like(a).fill_(1.0)
    reading = 4 * a.numel() / _best(lambda: a.sum(), where, repeats, clock)
    return max(reading, 8 * a.numel() / _best(lambda: b.copy_(a), where, repeats, clock))


def pass_overhead(
    *, blocks: tuple[int, int] = (2, 10), repeats: int = 20, where: str = "cpu", clock: Clock = time.perf_counter
) -> tuple[float, float]:
    """Seconds that a pass of transformers takes whatever its size: once, and for each block.

    The line through decoding steps of two Llamas of so many `blocks` that are too small to compute anything, the best
    of `repeats` steps each.
    """
    few, many = (_tiny_step(n, repeats, where, clock) for n in blocks)
    each = max(many - few, 0.0) / (blocks[1] - blocks[0])
    return max(few - blocks[0] * each, 0.0), each


def _tiny_step(blocks: int, repeats: int, where: str, clock: Clock) -> float:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "vocab_size": 16}
    model = CachedModel(LlamaForCausalLM(LlamaConfig(num_hidden_layers=blocks, **shape)).eval().to(where))
    token = torch.zeros(1, 1, dtype=torch.int64, device=where)
    with torch.inference_mode():
        model.start(token)
        return _best(lambda: model.step(token), where, repeats, clock)


def synchronize(where: str) -> None:
    """Wait until an accelerator has finished what it was given; nothing on a CPU."""
    if torch.device(where).type == "cuda":
        torch.cuda.synchronize(where)


def _best(work: Callable[[], object], where: str, repeats: int, clock: Clock) -> float:
    """Seconds of the fastest of `repeats` runs after one that is not counted; of one alone where that took long."""
    taken: list[float] = []
    while len(taken) <= repeats and not (len(taken) > 1 and taken[0] > _LONG):
        synchronize(where)
        began = clock()
        work()
        synchronize(where)
        taken.append(clock() - began)
    least = min(taken[1:])
    if least <= 0:
        raise PlanError("the clock did not advance while this device was measured: use larger sizes")
    return least
