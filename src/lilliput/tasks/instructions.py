"""Instructions without a right answer: what both models write, side by side.

Length and repetition are counted; the "win rate" asks which answer the base model itself finds likelier. That needs no
network and is a proxy: it rewards what the base model would have said, and bland or repetitive text with it, so read it
beside repetition. A compressed model that writes as the base does lies near a half. Where a judge is named (judge.py),
it compares the same answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lilliput.data.rows import chat
from lilliput.data.tokens import same_vocabulary, vocabulary_of
from lilliput.errors import DataError
from lilliput.metrics import paired
from lilliput.metrics.interval import Interval, clip, mean_interval
from lilliput.metrics.metric import Metric
from lilliput.options import Judge
from lilliput.progress import Progress, Quiet
from lilliput.source import open_source
from lilliput.tasks import judge as judges
from lilliput.tasks.answers import store_in
from lilliput.tasks.decode import greedy
from lilliput.tasks.files import Spec, category, parse, rows
from lilliput.tasks.judge import Judged
from lilliput.tasks.likelihood import Loaded, context_length, ids_of, log_likelihoods
from lilliput.tasks.run import fewer_note, loaded, shared_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KNOWN = "instructions"  # what such a task is called: instructions=FILE, or instructions:LABEL=FILE
NGRAM = 4
NOTE = "win rate: share of prompts where the base model finds our answer likelier than its own; a proxy for a judge"
_SHOWN = 5


@dataclass(frozen=True)
class Answered:
    """One instruction with both answers. ours_likelihood, base_likelihood: of the answers, mean nats a token, by the
    base model."""

    prompt: str
    ours: str
    base: str
    ours_likelihood: float
    base_likelihood: float

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Instructions:
    """What `compare_instructions` found; intervals are 95 % over prompts.

    ours_length, base_length: tokens of an answer; ours_repetition, base_repetition: share of an answer's 4-grams that
    occurred before in it; repetition_difference: paired; win_rate: see NOTE, equal answers count one half; identical:
    share of prompts with equal answers; examples: the first prompts whose answers differ; judge, judged: who judged,
    and what it said of all prompts and then of each category of them.
    """

    source: str
    prompts: int
    ours_length: Interval
    base_length: Interval
    ours_repetition: Interval
    base_repetition: Interval
    repetition_difference: Interval
    win_rate: Interval
    identical: Interval
    examples: tuple[Answered, ...]
    note: str
    judge: str | None = None
    judged: tuple[Judged, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON: intervals as {value, low, high}."""
        out = {k: v.to_json() if isinstance(v, Interval) else v for k, v in vars(self).items()}
        return out | {"examples": [x.to_json() for x in self.examples], "judged": [x.to_json() for x in self.judged]}


def repetition(ids: Sequence[int]) -> float:
    """Share of 4-grams that occurred before in the same text: 0 for none, towards 1 for a loop; 0 below 4 tokens."""
    grams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def instruction(row: Mapping[str, Any], where: str) -> str:
    """The instruction of a row: 'turns' (the first one), 'instruction' with the input of its first 'instances' or its
    'input', or 'prompt'. Raises DataError, led by `where`, that names the field at fault."""
    if "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns or not isinstance(turns[0], str) or not turns[0].strip():
            raise DataError(f"{where}: 'turns' must be a list that begins with text, not {turns!r}.")
        return str(turns[0])
    name = next((x for x in ("instruction", "prompt") if x in row), None)
    if name is None:
        raise DataError(f"{where}: there is no field 'turns', 'instruction' or 'prompt', only {', '.join(row)}.")
    if not isinstance(row[name], str) or not row[name].strip():
        raise DataError(f"{where}: '{name}' must be text, not {row[name]!r}.")
    instances = row.get("instances")
    inner = instances[0] if isinstance(instances, list) and instances and isinstance(instances[0], dict) else row
    return "\n\n".join(x for x in (row[name], inner.get("input")) if isinstance(x, str) and x)


def separate(
    tasks: Sequence[str], against: str | Path | None, judge: Judge | None = None
) -> tuple[list[str], list[Spec]]:
    """The tasks that have right answers, as they were named, and the files of instructions.

    Raises DataError where instructions name no file or hold a bad row, where there is no base model beside them, and
    where a judge does not answer or has nothing to judge.
    """
    scored = [x for x in tasks if parse(x).entry != KNOWN]
    specs = [parse(x) for x in tasks if x not in scored]
    for spec in specs:
        if spec.file is None or spec.examples is not None:
            raise DataError(f"instructions have a file of rows but no worked examples: give {spec.name}=FILE.jsonl.")
        if against is None:
            raise DataError(
                f"'{spec.name}' has no right answers, only those of two models: give the original with --against."
            )
        _asked(spec.file, None)
    if judge is not None:
        if not specs:
            raise DataError("a judge compares answers to instructions: give them with --tasks instructions=FILE.jsonl.")
        judges.check(judge)
    return scored, specs


def _asked(path: Path, limit: int | None) -> tuple[list[str], list[str]]:
    """Instructions, and the category of each."""
    pairs = [(instruction(row, f"row {n} of '{path}'"), category(row)) for n, row in rows(path)][:limit]
    if len(pairs) < 2:
        raise DataError(f"'{path}': {len(pairs)} instructions give no interval: ask at least 2.")
    return [x for x, _ in pairs], [x for _, x in pairs]


def _prompts(model: Loaded, instructions: Sequence[str]) -> list[str]:
    """Through the chat template where there is one, else as a question with room for an answer. Raises DataError where
    the template fails."""
    tokenizer = model.tokenizer
    if tokenizer.chat_template is None:
        return [f"{x}\n\n" for x in instructions]
    chats = [[{"role": "user", "content": x}] for x in instructions]
    return [chat(x, tokenizer, f"instruction {i}", answer=True) for i, x in enumerate(chats, 1)]


def _interval(values: Sequence[float], low: float = 0.0, high: float = float("inf")) -> Interval:
    return clip(mean_interval(torch.tensor(values, dtype=torch.float64)), low, high)


def _mean_likelihoods(model: Loaded, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Mean log-likelihood a token; minus infinity for an empty answer, which says nothing. Of an answer that takes more
    than half of the model's positions only the beginning counts: bytes that are no text may take three tokens each when
    they are read again."""
    tokenizer, room = model.tokenizer, context_length(model.model) // 2
    begun = [_beginning(tokenizer, a, room) for a in answers]
    scores = iter(log_likelihoods(model, [(p, a) for p, a in zip(prompts, begun, strict=True) if a]))
    lengths = [len(ids_of(tokenizer, a, special=False)) for a in begun]
    return [next(scores).value / n if a else -float("inf") for a, n in zip(begun, lengths, strict=True)]


def _beginning(tokenizer: PreTrainedTokenizerBase, text: str, most: int) -> str:
    """At most about `most` tokens of a text."""
    ids = ids_of(tokenizer, text, special=False)
    if len(ids) <= most:
        return text
    kept: str = tokenizer.decode(ids[:most], skip_special_tokens=False)
    return kept


def compare_instructions(
    model: str | Path,
    against: str | Path,
    file: str | Path,
    *,
    limit: int | None = None,
    tokens: int = 128,
    device: str = "cpu",
    dtype: str = "float32",
    work: str | Path | None = None,
    judge: Judge | None = None,
    progress: Progress | None = None,
) -> Instructions:
    """Greedy answers of both models to the instructions of a JSONL file (Vicuna-80, user-oriented, Self-Instruct).

    At most `tokens` tokens an answer; one model in memory at a time; work: folder that keeps answers, the judge's as
    well; judge: who compares them, once both models are freed. Raises DataError (bad row, fewer than two instructions,
    models with different tokenizers, a judge that does not answer), SourceError and PlanError as `run_tasks`.
    """
    path = Path(file)
    questions, categories = _asked(path, limit)
    tokenizer = open_source(str(model)).tokenizer()
    kept = shared_tokens(model, against)
    source = open_source(str(against))
    theirs = (source if kept is None else source.trimmed(kept)).tokenizer()
    same_vocabulary(vocabulary_of(tokenizer), vocabulary_of(theirs), f"'{model}' and '{against}'")
    folder = None if work is None else Path(work)
    with Quiet() if progress is None else progress as display:

        def step(done: int, total: int) -> None:
            display.step(done, total, "instructions")

        with loaded(model, device=device, dtype=dtype, work=folder) as whole:
            ours = greedy(whole, _prompts(whole, questions), tokens=tokens, step=step)
        del whole
        with loaded(against, device=device, dtype=dtype, work=folder, tokens=kept) as whole:
            prompts = _prompts(whole, questions)
            base = greedy(whole, prompts, tokens=tokens, step=step)
            likely = [_mean_likelihoods(whole, prompts, x) for x in (ours, base)]
        del whole
        judged: tuple[Judged, ...] = ()
        if judge is not None:
            answers = store_in(folder, "judge")
            judged = judges.compare(judge, questions, ours, base, categories=categories, store=answers, step=step)
    ids = [[ids_of(tokenizer, x, special=False) for x in answers] for answers in (ours, base)]
    repeated = [[repetition(x) for x in answers] for answers in ids]
    same = [a == b for a, b in zip(ours, base, strict=True)]
    wins = [0.5 if s else float(a > b) for s, a, b in zip(same, *likely, strict=True)]
    answered = [Answered(*x) for x in zip(questions, ours, base, *likely, strict=True)]
    return Instructions(
        source=str(path),
        prompts=len(questions),
        ours_length=_interval([len(x) for x in ids[0]]),
        base_length=_interval([len(x) for x in ids[1]]),
        ours_repetition=_interval(repeated[0]),
        base_repetition=_interval(repeated[1]),
        repetition_difference=_interval([a - b for a, b in zip(*repeated, strict=True)], -1.0),
        win_rate=_interval(wins, 0.0, 1.0),
        identical=paired.proportion(sum(same), len(same)),
        examples=tuple([x for x, s in zip(answered, same, strict=True) if not s][:_SHOWN]),
        note=NOTE if kept is None else f"{NOTE} Here {fewer_note(len(kept))}.",
        judge=None if judge is None else judge.model,
        judged=judged,
    )


METRIC = Metric(
    how="lilliput eval DIR --against MODEL --tasks instructions=FILE.jsonl",
    key="quality.instructions[].win_rate",
    unit="share of prompts",
    interval="Student's t over prompts",
    covers=("unseen-instructions",),
)
