"""EleutherAI's lm-evaluation-harness as a library: any task that it knows, and our models inside it.

Gao et al. 2024, doi:10.5281/zenodo.12608602. The package is optional (extra `eval`); its tasks fetch their data sets
from the Hugging Face hub, unless a task file of the user's own names local ones. Local files in this package's forms
need neither: see `files.load_task`.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lilliput.errors import DataError, LilliputError
from lilliput.metrics.metric import Metric
from lilliput.tasks.decode import greedy
from lilliput.tasks.likelihood import Encoded, Loaded, ids_of, log_likelihoods, scores

MISSING = "tasks without a file need the evaluation harness: pip install 'lilliput[eval]', or give NAME=FILE.jsonl."
# What a task is judged by, best first, among the metrics that it reports for each item.
_PREFERRED = ("acc_norm", "acc", "exact_match", "em", "f1")
_TOKENS = 256  # generated where a task does not say how many; the harness's own default


@dataclass(frozen=True)
class HarnessScores:
    """One task's scores by item, as the harness counts them. kind: the harness's output type; scores: metric -> score
    of each item (those with several filters are called METRIC,FILTER); fingerprint: sha256 (hex) of the prompts."""

    kind: str
    metric: str
    shots: int
    fingerprint: str
    scores: Mapping[str, Sequence[float]]


def installed() -> None:
    """Raises LilliputError where the harness is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise LilliputError(f"{MISSING} ({error})") from None


def adapter(loaded: Loaded, step: Callable[[int, int], None] = lambda done, total: None) -> Any:
    """A model as the harness's `LM`, scored by this package's code: pass it to `lm_eval.simple_evaluate(model=...)`.

    Raises LilliputError where the harness is not installed.
    """
    installed()
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Adapter(LM):  # type: ignore[misc]
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            likelihoods = log_likelihoods(loaded, [(x.args[0], x.args[1]) for x in requests], step=step)
            return [(x.value, x.greedy) for x in likelihoods]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            tokenizer = loaded.tokenizer
            start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            windows: list[Encoded] = []
            owners: list[int] = []
            for i, x in enumerate(requests):
                ids = ids_of(tokenizer, x.args[0])
                for part in get_rolling_token_windows(ids, start, loaded.length, 1):
                    before, after = make_disjoint_window(part)
                    windows.append(Encoded(tuple([*before, *after][:-1]), tuple(after)))
                    owners.append(i)
            sums = [0.0] * len(requests)
            for i, score in zip(owners, scores(loaded, windows, step=step), strict=True):
                sums[i] += score.value
            return sums

        def generate_until(self, requests: list[Any]) -> list[str]:
            answers: list[str] = []
            for x in requests:
                settings = dict(x.args[1])
                if settings.get("do_sample"):
                    raise DataError(
                        "this task samples its answers, but decoding here is always greedy: choose another task."
                    )
                stop = settings.get("until") or []
                tokens = int(settings.get("max_gen_toks", _TOKENS))
                stops = (stop,) if isinstance(stop, str) else tuple(stop)
                answers += greedy(loaded, [x.args[0]], stop=stops, tokens=tokens)
                step(len(answers), len(requests))
            return answers

    return Adapter()


@cache
def _manager(folder: Path | None) -> Any:
    """The harness's index of its tasks and of those in `folder`; made once, because that takes ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def _known(names: Sequence[str], folder: Path | None) -> Any:
    """The harness's task manager. Raises DataError for a name that it does not know."""
    manager = _manager(folder)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            raise DataError(f"the evaluation harness knows no task '{name}'.{hint} For a file give {name}=FILE.jsonl.")
    return manager


def check(name: str, definition: Path | None = None) -> None:
    """Raises LilliputError where the harness is not installed, DataError for a task that it does not know."""
    installed()
    _known([name], None if definition is None else definition.resolve().parent)


def by_item(samples: Sequence[Mapping[str, Any]], name: str) -> dict[str, list[float]]:
    """The harness's logged samples as scores by metric. Raises DataError where a task has no score for single items."""
    filters = {str(x["filter"]) for x in samples}
    by_metric: dict[str, dict[int, float]] = {}
    for x in samples:
        for metric in x["metrics"]:
            if isinstance(x[metric], bool | int | float) or hasattr(x[metric], "item"):
                key = metric if len(filters) == 1 else f"{metric},{x['filter']}"
                by_metric.setdefault(key, {})[int(x["doc_id"])] = float(x[metric])
    whole = {str(x["doc_id"]) for x in samples}
    by_metric = {metric: of for metric, of in by_metric.items() if len(of) == len(whole)}
    if not by_metric:
        raise DataError(f"the task '{name}' does not score single items: measure perplexity with --data instead.")
    return {metric: [of[i] for i in sorted(of)] for metric, of in by_metric.items()}


def _preferred(by_metric: Mapping[str, Sequence[float]]) -> str:
    ranked = [x for name in _PREFERRED for x in by_metric if x.partition(",")[0] == name]
    return (ranked or list(by_metric))[0]


def run(
    loaded: Loaded,
    names: Sequence[str],
    *,
    definition: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, HarnessScores]:
    """Scores by task of harness tasks or groups, run on a model in memory.

    definition: a task file of the user's own; what lies beside it is known too, and Python that it names with
    `!function` runs.

    Raises LilliputError where the harness is not installed, DataError for a task that it does not know, whose data set
    cannot be fetched or that scores no single items.
    """
    model = adapter(loaded, step)
    import lm_eval

    manager = _known(names, None if definition is None else definition.resolve().parent)
    try:
        results: Any = lm_eval.simple_evaluate(
            model=model,
            tasks=list(names),
            num_fewshot=shots,
            limit=limit,
            log_samples=True,
            bootstrap_iters=0,
            task_manager=manager,
        )
    except LilliputError:
        raise
    # The harness, data set scripts and the hub's client raise many unrelated classes; all mean that it cannot run.
    except Exception as error:
        raise DataError(
            f"the evaluation harness cannot run {', '.join(names)} ({type(error).__name__}: {error}). Its data "
            f"sets come from the Hugging Face hub: check the network, or give a local file, {names[0]}=FILE.jsonl."
        ) from error
    out: dict[str, HarnessScores] = {}
    for name, samples in results["samples"].items():
        by_metric = by_item(samples, name)
        prompts = sorted((int(x["doc_id"]), str(x["prompt_hash"])) for x in samples)
        out[name] = HarnessScores(
            kind=str(results["configs"][name].get("output_type", "")),
            metric=_preferred(by_metric),
            shots=int(results["n-shot"].get(name) or 0),
            fingerprint=hashlib.sha256(repr(prompts).encode()).hexdigest(),
            scores=by_metric,
        )
    return out


METRIC = Metric(
    how="lilliput eval DIR --against MODEL --tasks piqa,hellaswag",
    key="tasks[].difference, tasks[].also",
    unit="as the harness has it, by item",
    interval="score interval or bootstrap over items; paired",
    covers=("lm-harness",),
)
