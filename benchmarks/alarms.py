"""How often the paired perplexity ratio sees a loss that is not there, and one that is.

    python benchmarks/alarms.py BASE FOLDER [FOLDER ...] --text TEST.txt --windows 40 --out alarms.json

Real differences of a folder's and its original's loss, a window each, are the noise. Their signs flipped at random make
pairs of models without a difference: an interval of the ratio that excludes 1 is a false alarm. The same flips shifted
by ln 1.03 are a loss of 3 %: found where the interval lies above 1. "raw" flips the differences themselves, which
a model that lost much makes large; "centred" takes their mean away first, which leaves the differences between
windows alone. Then 16 windows are drawn again and again from all, centred and shifted by ln 1.01.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lilliput.data import load_tokens
from lilliput.metrics import evaluate
from lilliput.metrics.interval import Interval, exp_interval
from lilliput.model.stored import open_model

TRIES = 200
SIXTEEN = 16


def differences(folders: list[Path], base: Path, text: str, windows: int, tokens: int) -> list[Tensor]:
    """Mean loss of each folder less the original's, nats, float64 [windows]."""
    models = [open_model(str(x)) for x in folders]
    ids = load_tokens(text, models[0].source.tokenizer(), samples=windows, tokens=tokens).ids
    scores = evaluate._scores(models, open_model(str(base)), ids, None, None, None)
    differences_by_folder = []
    for one in scores:
        if one.reference is None:
            raise RuntimeError("no original was measured")
        differences_by_folder.append((one.nll - one.reference).mean(1))
    return differences_by_folder


def above(interval: Interval) -> bool:
    return interval.low > 1


def rates(noise: Tensor, draw: torch.Generator) -> dict[str, int]:
    """Of `TRIES` flips: false alarms to either side, and losses of 3 % that were found."""
    alarms = detections = 0
    for _ in range(TRIES):
        signs = torch.randint(2, noise.shape, generator=draw).double() * 2 - 1
        nothing = exp_interval(signs * noise)
        alarms += above(nothing) or nothing.high < 1
        detections += above(exp_interval(signs * noise + math.log(1.03)))
    return {"alarms": alarms, "found_3_percent": detections, "of": TRIES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    measured = differences(arguments.folders, arguments.base, arguments.text, arguments.windows, arguments.tokens)
    rows: list[dict[str, Any]] = []
    for folder, every in zip(arguments.folders, measured, strict=True):
        draw = torch.Generator().manual_seed(0)
        first, centred = every[:SIXTEEN], every - every.mean()
        draws = (centred[torch.randint(len(every), (SIXTEEN,), generator=draw)] for _ in range(TRIES))
        rows.append(
            {
                "folder": folder.name,
                "ratio": exp_interval(first).to_json(),
                "deviation": float(every.std()),
                "raw": rates(first, draw),
                "centred": rates(first - first.mean(), draw),
                "found_1_percent": sum(above(exp_interval(x + math.log(1.01))) for x in draws),
                "of": TRIES,
                "differences": every.tolist(),
            }
        )
        print(json.dumps({k: v for k, v in rows[-1].items() if k != "differences"}), flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
