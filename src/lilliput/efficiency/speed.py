"""Measured speed of a model beside its base, interleaved in one run.

Both models are loaded by transformers and stay in memory together, so drift of the machine (clock, other work) meets
both alike: each round runs A's prefill and decoding and then B's, and the speed-up is taken round by round. What is
measured is what transformers does with a folder: compressed-tensors folders are decoded at load and run dense,
Lilliput's own layout is decoded in each pass. A prefill computes logits at its last token only, as generation does; a
decoding step is one token with the keys and values of all before it cached. Inputs are random tokens: time does not
depend on what they are, except through the choice of experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lilliput.efficiency.counts import prefill_flops, serving_of
from lilliput.efficiency.devices import Clock, matmul_peak
from lilliput.efficiency.peak import peak_memory
from lilliput.efficiency.runner import Runner
from lilliput.efficiency.shapes import shapes_of
from lilliput.errors import DataError, SourceError
from lilliput.metrics.interval import Interval, exp_interval
from lilliput.model.stored import open_model

PROMPT, NEW = 512, 32  # tokens of the prompt and of the answer, where nobody says otherwise


@dataclass(frozen=True)
class Timing:
    """Seconds of one prefill, or of one decoded token; best: of the fastest round, what other work disturbed least."""

    median: float
    p95: float
    best: float

    def to_json(self) -> dict[str, float]:
        return dict(vars(self))


@dataclass(frozen=True)
class Phase:
    """tokens: of the prompt, or decoded in a round; speedup: base seconds over seconds, paired by round, 95 %."""

    tokens: int
    seconds: Timing
    base_seconds: Timing | None = None
    speedup: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "seconds": self.seconds.to_json(),
            "base_seconds": None if self.base_seconds is None else self.base_seconds.to_json(),
            "speedup": None if self.speedup is None else self.speedup.to_json(),
        }


@dataclass(frozen=True)
class Speed:
    """throughput: decoded tokens a second, all sequences of the batch; peak_rss_bytes: of loading and running each
    model in a process of its own, above its imported libraries (None where not measured); mfu: operations of the
    prefill over its median time, as a share of peak_flops, this device's measured peak in the model's dtype (Chowdhery
    et al. 2022, "PaLM", appendix B)."""

    runs: int
    batch: int
    prefill: Phase
    decode: Phase
    throughput: float
    mfu: float
    peak_flops: float
    dtype: str
    device: str
    threads: int
    base_throughput: float | None = None
    base_mfu: float | None = None
    peak_rss_bytes: int | None = None
    base_peak_rss_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data: the report's "speed"."""
        return {**vars(self), "prefill": self.prefill.to_json(), "decode": self.decode.to_json()}


class Runs(Protocol):
    """What `interleave` times."""

    def prefill(self) -> None: ...
    def decode(self) -> None: ...


def interleave(
    runners: Sequence[Runs], *, runs: int, warmup: int, clock: Clock = time.perf_counter
) -> list[tuple[list[float], list[float]]]:
    """Seconds of each runner's prefills and of its decodings, round by round: A, B, A, B, ... after `warmup` rounds.

    Raises DataError for fewer than 2 runs, which give no interval.
    """
    if runs < 2 or warmup < 0:
        raise DataError(
            f"{runs} runs after {warmup} rounds of warm-up: a speed-up with an interval takes 2 runs or more"
        )
    found: list[tuple[list[float], list[float]]] = [([], []) for _ in runners]
    for i in range(warmup + runs):
        for runner, (prefills, decodings) in zip(runners, found, strict=True):
            for work, seconds in ((runner.prefill, prefills), (runner.decode, decodings)):
                spent = _time(work, clock)
                if i >= warmup:
                    seconds.append(spent)
    return found


def timing(seconds: Sequence[float]) -> Timing:
    """Median and 95th percentile, both interpolated between neighbours, and the fastest."""
    values = torch.tensor(seconds, dtype=torch.float64)
    return Timing(float(values.quantile(0.5)), float(values.quantile(0.95)), float(values.min()))


def speedup(base: Sequence[float], own: Sequence[float]) -> Interval:
    """Geometric mean of base over own, paired by round, with its 95 % interval. Raises DataError: fewer than 2 rounds,
    or a time of zero."""
    if min(*base, *own) <= 0:
        raise DataError("a run took no time by this clock: measure with more tokens")
    a, b = (torch.tensor(x, dtype=torch.float64) for x in (base, own))
    return exp_interval(a.log() - b.log())


def measure_speed(
    model: str | Path,
    base: str | Path | None = None,
    *,
    prompt: int | None = None,
    new: int | None = None,
    batch: int = 1,
    runs: int = 10,
    warmup: int = 2,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    memory: bool = True,
    clock: Clock = time.perf_counter,
) -> Speed:
    """Speed of the folder `model`, and of `base` interleaved with it. Both are held in memory at once.

    prompt, new: 512 and 32 tokens, or as many as both models know positions (15 of 16 for the prompt).
    dtype: of the loaded models, by default each folder's own; memory: measure the peak memory as well, by loading each
    model again in a child process (CPU only). Raises DataError (too few runs, a prompt of no tokens or beyond the
    model's positions) and SourceError (a model that cannot be read, base and model in different dtypes).
    """
    names = [str(model)] + ([str(base)] if base is not None else [])
    models = [open_model(x) for x in names]
    opened = [shapes_of(x) for x in models]
    served = [serving_of(x, shapes) for x, shapes in zip(models, opened, strict=True)]
    del models
    prompt, new = _lengths(prompt, new, [x.positions for x in opened if x.positions is not None])
    if min(prompt, new, batch) < 1:
        raise DataError(f"batch {batch}, prompt {prompt}, new {new}: each is 1 or more")
    for name, shapes in zip(names, opened, strict=True):
        if shapes.positions is not None and prompt + new > shapes.positions:
            raise DataError(
                f"{prompt} + {new} tokens are more than the {shapes.positions} positions of {name}: ask for fewer"
            )
    threads = torch.get_num_threads()
    peaks: list[int | None] = [None, None]
    if memory and torch.device(device).type == "cpu":
        kind = "auto" if dtype is None else str(dtype).removeprefix("torch.")
        for i, name in enumerate(names):
            peaks[i] = peak_memory(name, prompt=prompt, new=new, batch=batch, threads=threads, dtype=kind)
    runners = [Runner(x, prompt=prompt, new=new, batch=batch, dtype=dtype, device=device) for x in names]
    if len({x.dtype for x in runners}) > 1:
        raise SourceError(
            f"'{names[0]}' loads as {runners[0].dtype} and '{names[1]}' as {runners[1].dtype}: their times would "
            "compare dtypes; say which dtype to load both in"
        )
    found = interleave(runners, runs=runs, warmup=warmup, clock=clock)
    found = [(prefills, [x / new for x in decodings]) for prefills, decodings in found]
    peak = matmul_peak(runners[0].dtype, where=device, clock=clock)
    own, theirs = found[0], found[1] if base is not None else None
    phases = [
        Phase(
            tokens,
            timing(own[i]),
            None if theirs is None else timing(theirs[i]),
            None if theirs is None else speedup(theirs[i], own[i]),
        )
        for i, tokens in ((0, prompt), (1, new))
    ]
    work = [prefill_flops(x, batch, prompt, how) for x, how in zip(opened, served, strict=True)]
    before = [x.base_seconds for x in phases]
    return Speed(
        runs=runs,
        batch=batch,
        prefill=phases[0],
        decode=phases[1],
        throughput=batch / phases[1].seconds.median,
        mfu=work[0] / phases[0].seconds.median / peak,
        peak_flops=peak,
        dtype=str(runners[0].dtype).removeprefix("torch."),
        device=device,
        threads=threads,
        base_throughput=None if before[1] is None else batch / before[1].median,
        base_mfu=None if before[0] is None else work[1] / before[0].median / peak,
        peak_rss_bytes=peaks[0],
        base_peak_rss_bytes=peaks[1],
    )


def _lengths(prompt: int | None, new: int | None, positions: Sequence[int]) -> tuple[int, int]:
    """Tokens of prompt and answer: what is not given is fitted to the positions that the models know."""
    room = min(positions, default=PROMPT + NEW)
    if new is None:
        new = max(1, min(NEW, room // 16 if prompt is None else room - prompt))
    return (max(1, min(PROMPT, room - new)) if prompt is None else prompt), new


def _time(work: Callable[[], None], clock: Clock) -> float:
    began = clock()
    work()
    return clock() - began
