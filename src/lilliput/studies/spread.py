"""What a result owes to the calibration text: the same recipe on several draws of it.

Downstream results vary with the calibration samples, most for pruning and for few bits (Williams and Aletras 2024, "On
the impact of calibration data in post-training quantization and pruning", arXiv:2311.09755), so one run says little of
a recipe. The model is compressed once for each seed, which draws the samples, and measured each time on the same text.
For each figure: the mean over seeds with its interval (Student's t), the standard deviation, the least and the most,
and `text`, half the width of a run's own interval on average: what the text that is measured on leaves open. Where the
deviation is larger than a difference between two recipes, that difference is no finding.

OUT keeps a record of each seed, so a run that is repeated goes on; compressed folders are removed once they are
measured, unless they are to be kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lilliput import api
from lilliput.errors import DataError, PlanError
from lilliput.metrics.evaluate import Evaluation, evaluate
from lilliput.metrics.interval import Interval, mean_interval
from lilliput.metrics.metric import Metric
from lilliput.options import Calibration, Compute, Limits, Text
from lilliput.progress import Progress
from lilliput.recipe.schema import Recipe
from lilliput.run import journal

FIGURES = ("perplexity_ratio", "kl", "perplexity", "agreement")
LEAST = 3  # seeds that show a spread at all
_SETTINGS = "settings.json"


@dataclass(frozen=True)
class Figure:
    """One figure over the seeds; mean: with the interval of the mean; deviation: standard, of single runs; least, most:
    of the runs; text: half the width of a run's own interval, on average."""

    name: str
    mean: Interval
    deviation: float
    least: float
    most: float
    text: float

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "mean": self.mean.to_json()}


@dataclass(frozen=True)
class Spread:
    """runs: a row for each seed, with the figures as {value, low, high}; figures: over them; data: measured on."""

    model: str
    data: str
    seeds: tuple[int, ...]
    runs: tuple[Mapping[str, Any], ...]
    figures: tuple[Figure, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        figures = [x.to_json() for x in self.figures]
        return {**vars(self), "seeds": list(self.seeds), "runs": [dict(x) for x in self.runs], "figures": figures}


def spread(
    model: str | Path,
    out: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    recipe: str | Path | Recipe,
    settings: Sequence[str] = (),
    calibration: Calibration = Calibration(),
    limits: Limits = Limits(),
    compute: Compute = Compute(),
    text: Text = Text(),
    keep: bool = False,
    progress: Progress | None = None,
) -> Spread:
    """Compress `model` with each seed into a folder of `out`, measure it against `model`, and say how results differ.

    recipe, settings: as those of `lilliput.compress`; calibration: its own seed does not count; text: what is measured
    on; keep: leave the compressed folders, `out`/seed-N, where they are. Raises LilliputError: fewer than 3 seeds, a
    recipe that reads no calibration text, an `out` with runs of other settings, and whatever stands in the way of
    compressing or measuring.
    """
    folder = Path(out)
    if len(set(seeds)) < max(LEAST, len(seeds)):
        raise PlanError(f"--seeds {','.join(map(str, seeds))}: a spread takes {LEAST} seeds or more, all different")
    if text.windows < 2:
        raise DataError("one window gives no interval: use 2 or more")
    sampling = {"data": calibration.data, "samples": calibration.samples, "tokens": calibration.tokens}
    shared: dict[str, Any] = {"recipe": recipe, "settings": settings, **sampling, **vars(limits), **vars(compute)}
    plan = api.plan(model, seed=seeds[0], **shared)
    if not plan.resolved.reads_tokens:
        raise PlanError("no step of this recipe reads calibration text: every seed would give the same model")
    study = {"model": plan.fingerprint, "recipe": plan.to_json()["recipe"], **sampling, "dtype": compute.dtype}
    _begin(folder, {**study, "text": vars(text)})
    runs = []
    for seed in seeds:
        record, place = folder / f"seed-{seed}.json", folder / f"seed-{seed}"
        if not record.exists():
            if not place.is_dir() or journal.published(place.absolute(), compute.work):
                api.compress(model, place, seed=seed, eval_windows=0, progress=progress, **shared)
            evaluation = evaluate(place, model, **vars(text), memory=limits.memory, progress=progress)
            _write(record, {"seed": seed, **_figures(evaluation)})
        if not keep and place.is_dir():
            shutil.rmtree(place)
        runs.append(_read(record))
    figures = tuple(_over(name, runs) for name in FIGURES)
    return Spread(str(model), text.data[0], tuple(seeds), tuple(runs), figures)


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    plain = evaluation.to_json()
    return {name: plain[name] for name in FIGURES}


def _over(name: str, runs: Sequence[Mapping[str, Any]]) -> Figure:
    values = torch.tensor([run[name]["value"] for run in runs], dtype=torch.float64)
    halves = [(run[name]["high"] - run[name]["low"]) / 2 for run in runs]
    return Figure(
        name,
        mean_interval(values),
        float(values.std(correction=1)),
        float(values.min()),
        float(values.max()),
        sum(halves) / len(halves),
    )


def _begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder, or finds that what is there belongs to the same study. Raises PlanError where it does not."""
    path = folder / _SETTINGS
    if path.exists():
        before = _read(path)
        other = [key for key in settings if before.get(key) != json.loads(json.dumps(settings[key]))]
        if other:
            raise PlanError(f"{folder} holds runs with another {', '.join(other)}: choose another --out")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PlanError(f"{folder} exists and holds no such runs: choose another --out, or empty it")
    if not folder.absolute().parent.is_dir():
        raise PlanError(f"the folder {folder.absolute().parent} does not exist: create it, or choose another --out")
    folder.mkdir(exist_ok=True)
    _write(path, settings)


def _write(path: Path, data: Mapping[str, Any]) -> None:
    """By rename, so that a record is whole or not there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no record of a run ({error}): remove it, and that seed runs again") from None
    return record


METRIC = Metric(
    how="lilliput spread MODEL --recipe w4 --seeds 0,1,2 --data wikitext2:train --out DIR",
    key="figures[].mean, figures[].deviation, figures[].least, figures[].most",
    unit="as the figure: 1, nats per token, share",
    interval="Student's t over calibration seeds",
    covers=("calibration-data",),
    paper="Williams and Aletras 2024, arXiv:2311.09755",
)
