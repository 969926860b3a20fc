"""Measured speed of a model beside its base, interleaved in one run.

Both models are loaded by transformers and stay in memory together, so drift of the machine (clock, other work) meets
both alike: each round runs A's prefill and decoding and then B's, and the speed-up is taken round by round. What is
measured is what transformers does with a folder: compressed-tensors folders are decoded at load and run dense,
Lilliput's own layout is decoded in each pass. A prefill computes logits at its last token only, as generation does; a
decoding step is one token with the keys and values of all before it cached, and the device has finished before the next
one begins, as it has where somebody waits for it. Latencies are of a prefill in each round and of every decoded token:
the median (p50), and the 90th and 95th percentiles, which tell what a user waits for now and then. Inputs are random
tokens: time does not depend on what they are, except through the choice of experts.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch

from lilliput.efficiency.counts import prefill_flops, serving_of
from lilliput.efficiency.devices import Clock, matmul_peak
from lilliput.efficiency.peak import peak_memory
from lilliput.efficiency.runner import Runner
from lilliput.efficiency.shapes import shapes_of
from lilliput.errors import DataError, SourceError
from lilliput.metrics.interval import Interval, exp_interval
from lilliput.metrics.metric import Metric
from lilliput.model.stored import open_model

PROMPT, NEW = 512, 32  # tokens of the prompt and of the answer, where nobody says otherwise


@dataclass(frozen=True)
class Timing:
    """Seconds of a prefill over the rounds, or of a decoded token over all of them: median (p50), percentiles, and the
    best, what other work disturbed least."""

    median: float
    p90: float
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
    """throughput: decoded tokens a second of the median round, all sequences of the batch; peak_rss_bytes: of loading
    and running each model in a process of its own, above its imported libraries (None where not measured); mfu:
    operations of the prefill over its median time, as a share of peak_flops, this device's measured peak in the model's
    dtype (Chowdhery et al. 2022, "PaLM", appendix B)."""

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
    def decode(self, lap: Callable[[], None]) -> None: ...


@dataclass(frozen=True)
class Rounds:
    """Seconds of each round's prefill, and of each token that it decoded."""

    prefill: tuple[float, ...]
    decode: tuple[tuple[float, ...], ...]

    @property
    def token(self) -> list[float]:
        """Mean seconds of a decoded token, round by round."""
        return [sum(x) / len(x) for x in self.decode]


def interleave(runners: Sequence[Runs], *, runs: int, warmup: int, clock: Clock = time.perf_counter) -> list[Rounds]:
    """Seconds of each runner's prefills and decoded tokens, round by round: A, B, A, B, ... after `warmup` rounds.

    Raises DataError for fewer than 2 runs, which give no interval.
    """
    if runs < 2 or warmup < 0:
        raise DataError(
            f"{runs} runs after {warmup} rounds of warm-up: a speed-up with an interval takes 2 runs or more"
        )
    prefills: list[list[float]] = [[] for _ in runners]
    decodings: list[list[tuple[float, ...]]] = [[] for _ in runners]
    for _ in range(warmup + runs):
        for runner, before, after in zip(runners, prefills, decodings, strict=True):
            began = clock()
            runner.prefill()
            before.append(clock() - began)
            laps = [clock()]
            runner.decode(lambda laps=laps: laps.append(clock()))  # type: ignore[misc]
            after.append(tuple(b - a for a, b in itertools.pairwise(laps)))
    return [Rounds(tuple(a[warmup:]), tuple(b[warmup:])) for a, b in zip(prefills, decodings, strict=True)]


def timing(seconds: Sequence[float]) -> Timing:
    """Median and percentiles, interpolated between neighbours, and the fastest."""
    median, p90, p95 = (float(x) for x in np.percentile(seconds, (50, 90, 95)))
    return Timing(median, p90, p95, min(seconds))


def speedup(base: Sequence[float], own: Sequence[float]) -> Interval:
    """Geometric mean of base over own, paired by round, with its 95 % interval. Raises DataError: fewer than 2 rounds,
    or a time of zero."""
    if min(*base, *own) <= 0:
        raise DataError("a run took no measurable time: use more tokens")
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
            f"'{names[0]}' loads as {runners[0].dtype} and '{names[1]}' as {runners[1].dtype}: their times "
            "would compare dtypes; give one dtype for both"
        )
    times = interleave(runners, runs=runs, warmup=warmup, clock=clock)
    peak = matmul_peak(runners[0].dtype, where=device, clock=clock)
    own, theirs = times[0], times[1] if base is not None else None
    prefill = Phase(
        prompt,
        timing(own.prefill),
        None if theirs is None else timing(theirs.prefill),
        None if theirs is None else speedup(theirs.prefill, own.prefill),
    )
    decode = Phase(
        new,
        timing([x for tokens in own.decode for x in tokens]),
        None if theirs is None else timing([x for tokens in theirs.decode for x in tokens]),
        None if theirs is None else speedup(theirs.token, own.token),
    )
    work = [prefill_flops(x, batch, prompt, how) for x, how in zip(opened, served, strict=True)]
    return Speed(
        runs=runs,
        batch=batch,
        prefill=prefill,
        decode=decode,
        throughput=batch / median(own.token),
        mfu=work[0] / prefill.seconds.median / peak,
        peak_flops=peak,
        dtype=str(runners[0].dtype).removeprefix("torch."),
        device=device,
        threads=threads,
        base_throughput=None if theirs is None else batch / median(theirs.token),
        base_mfu=None if prefill.base_seconds is None else work[1] / prefill.base_seconds.median / peak,
        peak_rss_bytes=peaks[0],
        base_peak_rss_bytes=peaks[1],
    )


def _lengths(prompt: int | None, new: int | None, positions: Sequence[int]) -> tuple[int, int]:
    """Tokens of prompt and answer: what is not given is fitted to the positions that the models know."""
    room = min(positions, default=PROMPT + NEW)
    if new is None:
        new = max(1, min(NEW, room // 16 if prompt is None else room - prompt))
    return (max(1, min(PROMPT, room - new)) if prompt is None else prompt), new


METRIC = Metric(
    how="lilliput eval DIR --against MODEL --speed",
    key="speed.prefill, speed.decode, speed.mfu",
    unit="seconds, 1, share of the measured peak",
    interval="Student's t over interleaved rounds, of the speed-up",
    covers=(
        "latency",
        "speedup",
        "mfu",
    ),
    paper="Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B (utilisation)",
)
