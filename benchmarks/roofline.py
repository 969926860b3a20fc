"""Predicted against measured time on this machine's CPU: how far the roofline is off.

    python benchmarks/roofline.py BASE FOLDER [FOLDER ...] --threads 2 --context 512 --out roofline.json

The device is measured first, then each folder is predicted and run (interleaved with BASE). Predictions come from
config and format alone; the error is prediction over the measured median (and over the fastest round, which other work
on the machine disturbs least), minus one. Python and launches are measured with the device; what is left out (products
of these shapes are slower than square ones, norms are not fused, the cache is copied) only adds time, so errors are
expected to be negative.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from lilliput.efficiency import measure_device, measure_speed, rooflines
from lilliput.model.stored import open_model


def compare(base: Path, folder: Path, *, contexts: list[int], new: int, runs: int) -> list[dict[str, Any]]:
    """A row for each context and phase: seconds predicted and measured, of folder and base, and their errors."""
    rows = []
    device = measure_device()
    model, original = open_model(str(folder)), open_model(str(base))
    for context in contexts:
        speed = measure_speed(folder, base, prompt=context, new=new, runs=runs, memory=False)
        for phase, measured in (("prefill", speed.prefill), ("decode", speed.decode)):
            # The measured steps attend to context + 1 to context + new tokens.
            length = context if phase == "prefill" else context + (new + 1) // 2
            predictions = rooflines(model, original, [device], batches=(1,), contexts=(length,))
            row = next(x for x in predictions if x.phase == phase)
            if row.base_seconds is None or measured.base_seconds is None or measured.speedup is None:
                raise RuntimeError("no base was measured")
            rows.append(
                {
                    "folder": folder.name,
                    "context": context,
                    "phase": phase,
                    "bound": row.bound,
                    "predicted": row.seconds,
                    "measured": measured.seconds.to_json(),
                    "error": row.seconds / measured.seconds.median - 1,
                    "error_to_best": row.seconds / measured.seconds.best - 1,
                    "base_predicted": row.base_seconds,
                    "base_measured": measured.base_seconds.to_json(),
                    "base_error": row.base_seconds / measured.base_seconds.median - 1,
                    "base_error_to_best": row.base_seconds / measured.base_seconds.best - 1,
                    "predicted_speedup": row.speedup,
                    "measured_speedup": measured.speedup.to_json(),
                    "mfu": speed.mfu,
                    "peaks": dict(device.peaks),
                    "bandwidth": device.bandwidth,
                    "overhead": device.overhead,
                    "threads": speed.threads,
                }
            )
            print(f"{folder.name} {context} {phase}", _line("", rows[-1]), _line("base_", rows[-1]), flush=True)
    return rows


def _line(which: str, row: dict[str, Any]) -> str:
    """Prediction, measurement and error of one model as text."""
    seconds = row["base_measured" if which else "measured"]
    return (
        f"{which}predicted {row[which + 'predicted'] * 1e3:.1f} ms, median {seconds['median'] * 1e3:.1f} ms "
        f"({row[which + 'error']:+.0%}), best {seconds['best'] * 1e3:.1f} ms ({row[which + 'error_to_best']:+.0%});"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted against measured time on this machine's CPU.")
    parser.add_argument("base", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, action="append")
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for folder in arguments.folders:
        rows += compare(
            arguments.base, folder, contexts=arguments.context or [512], new=arguments.new, runs=arguments.runs
        )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
