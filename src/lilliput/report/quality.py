"""The quality section of the page: data sets, token classes, positions, tasks, continuations, worst tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lilliput.report import cells, figures
from lilliput.report.blocks import Block, Examples, Prose, Section, example
from lilliput.report.cells import Cell, Table, table, words
from lilliput.report.figures import Row
from lilliput.report.groups import TONES, grouped, judged_table
from lilliput.report.sections import label
from lilliput.report.svg import Picture

Data = Mapping[str, Any]
_WORST = 40
_EXAMPLES = 8


def quality(evidence: Data) -> Section | None:
    part = evidence.get("quality") or {}
    blocks = [
        *_data(part.get("data") or ()),
        *_classes(part.get("classes") or ()),
        *_positions(part.get("positions") or ()),
        *_tasks(evidence.get("tasks") or ()),
        *grouped(evidence),
        *_generation(part.get("generation") or {}),
        *_instructions(part.get("instructions") or ()),
        *_worst(part.get("worst") or ()),
    ]
    return Section("quality", "Quality", blocks) if blocks else None


def ratio_tone(ratio: Data) -> str:
    """The colour of a perplexity ratio, by the same limits as the verdict."""
    from lilliput.report.verdict import BAD_RATIO, OK_RATIO

    if ratio["low"] > BAD_RATIO:
        return "bad"
    if ratio["high"] < OK_RATIO:
        return "ok"
    return "loss" if ratio["low"] > 1 else "unsure"


def _data(rows: Sequence[Data]) -> list[Block]:
    if not rows:
        return []
    blocks: list[Block] = []
    paired = [x for x in rows if x.get("perplexity_ratio")]
    if paired:
        data = table(
            ("data", "windows", "tokens", "perplexity ratio", "text", "fingerprint"),
            [
                (
                    words(x["name"]),
                    cells.number(x.get("windows")),
                    cells.number(x.get("tokens")),
                    cells.interval(x["perplexity_ratio"]),
                    words(x.get("source")),
                    words(str(x.get("fingerprint") or "")[:16]),
                )
                for x in paired
            ],
        )
        lines = [
            Row(
                str(x["name"]),
                *_ends(x["perplexity_ratio"]),
                cells.interval(x["perplexity_ratio"]).line,
                ratio_tone(x["perplexity_ratio"]),
            )
            for x in paired
        ]
        caption = "Perplexity over the original's, on the same windows."
        drawings = figures.forest("ratio", lines, "perplexity ratio (1: no change)", 1.0)
        blocks.append(Picture(*drawings, label(caption, data), caption, data))
    return [*blocks, data_table(rows)]


def data_table(rows: Sequence[Data]) -> Table:
    """Every figure of every data set."""
    columns = ("data", "perplexity, × original", "KL, nats", "KL, 95th percentile", "KL, 99th")
    metrics = ("perplexity_ratio", "kl", "kl_p95", "kl_p99")
    alone = ("perplexity", "reference_perplexity")
    lines = [
        (
            words(x["name"]),
            *(cells.interval(x.get(key)) for key in metrics),
            cells.shares(x.get("agreement")),
            *(cells.interval(x.get(key)) for key in alone),
        )
        for x in rows
    ]
    names = (*columns, "same top token", "perplexity", "original's perplexity")
    return table(names, lines, "Figures by data set; in brackets the 95 % interval.")


def _classes(rows: Sequence[Data]) -> list[Block]:
    measured = [x for x in rows if x.get("kl")]
    if not measured:
        return []
    data = table(
        ("tokens of class", "count", "KL, nats", "top-1 agreement"),
        [
            (
                words(x["name"]),
                cells.number(x.get("tokens")),
                cells.interval(x["kl"], 3),
                cells.shares(x.get("agreement")),
            )
            for x in measured
        ],
    )
    lines = [
        Row(str(x["name"]), x["kl"]["value"], x["kl"]["low"], x["kl"]["high"], cells.interval(x["kl"], 3).line)
        for x in measured
    ]
    caption = "KL divergence from the original by class of token: what kind of text suffers."
    drawings = figures.forest("classes", lines, "KL, nats", 0.0)
    return [Picture(*drawings, label(caption, data), caption, data)]


def _positions(rows: Sequence[Data]) -> list[Block]:
    measured = [x for x in rows if x.get("kl")]
    if len(measured) < 2:
        return []
    data = table(
        ("from", "to", "KL, nats"),
        [(cells.number(x["from"]), cells.number(x["to"]), cells.interval(x["kl"], 3)) for x in measured],
    )
    points = [((x["from"] + x["to"]) / 2, x["kl"]["value"], x["kl"]["low"], x["kl"]["high"]) for x in measured]
    caption = "KL divergence by position in the window: whether long contexts suffer more."
    drawings = figures.curve("positions", points, "position, tokens", "KL, nats")
    return [Picture(*drawings, label(caption, data), caption, data)]


def _tasks(rows: Sequence[Data]) -> list[Block]:
    if not rows:
        return []
    whole = task_table(rows)
    # One axis of percentage points: scores of another kind have only their row in the table.
    compared = [x for x in rows if x.get("difference") and x.get("flips")]
    if not compared:
        return [whole]
    lines = [
        Row(
            str(x["name"]),
            *_ends(x["difference"], 100.0),
            _difference(x).line,
            TONES.get(str(x.get("level")), "ours"),
        )
        for x in compared
    ]
    caption = "Tasks: compressed less original; left of the line is a loss."
    data = table(
        ("task", "difference", "verdict"),
        [(words(x["name"]), _difference(x), words(x.get("verdict"))) for x in compared],
    )
    drawings = figures.forest("tasks", lines, "percentage points", 0.0)
    return [Picture(*drawings, label(caption, data), caption, data), whole]


def task_table(rows: Sequence[Data]) -> Table:
    """Every task with its verdict in words."""
    lines = [
        (
            words(x["name"]),
            words(x.get("verdict"), TONES.get(str(x.get("level")), "")),
            _difference(x),
            _score(x, "base"),
            _score(x, "ours"),
            cells.number(x.get("items")),
            _flips(x),
            words(x.get("metric")),
            cells.number(x.get("p_holm"), 2),
            _points(x.get("detectable")),
        )
        for x in rows
    ]
    columns = ("task", "verdict", "difference", "original", "compressed", "items", "answers", "metric")
    note = (
        "Differences in percentage points on the same items. Could show: the smallest loss that these items would "
        "have shown with 80 % probability."
    )
    return table((*columns, "p (Holm)", "could show"), lines, "Tasks.", note=note)


def _ends(interval: Data, factor: float = 1.0) -> tuple[float, float, float]:
    return factor * interval["value"], factor * interval["low"], factor * interval["high"]


def _score(row: Data, key: str) -> Cell:
    """A task's score: in percent where items are right or wrong, else as it is."""
    return cells.shares(row.get(key)) if row.get("flips") else cells.interval(row.get(key))


def _difference(row: Data) -> Cell:
    """A task's difference: in percentage points where items are right or wrong, else as it is."""
    difference = row.get("difference")
    if not difference:
        return Cell(cells.MISSING)
    factor, form = (100.0, "+.1f") if row.get("flips") else (1.0, "+.3g")
    value, low, high = (f"{x:{form}}".replace("-", "−") for x in _ends(difference, factor))
    return Cell(value, float(difference["value"]), below=f"[{low}, {high}]")


def _points(share: float | None) -> Cell:
    return Cell(cells.MISSING) if share is None else Cell(f"{100 * share:.1f}", share)


def _flips(row: Data) -> Cell:
    flips = row.get("flips")
    return words(f"{flips['right_to_wrong']} lost, {flips['wrong_to_right']} won" if flips else None)


def _generation(part: Data) -> list[Block]:
    if not part:
        return []
    lines = []
    if part.get("first_difference"):
        words_of = cells.interval(part["first_difference"], 3).line
        lines.append(f"Greedy continuations first differ after {words_of} tokens, over {part.get('prompts')} prompts.")
    if part.get("identical"):
        lines.append(f"Continuations that do not differ: {cells.shares(part['identical']).line}.")
    blocks: list[Block] = [Prose(tuple(lines))] if lines else []
    rows = tuple(
        example(
            str(x["prompt"]),
            str(x["ours"]),
            str(x["theirs"]),
            "no difference" if x.get("first_difference") is None else f"first differs at token {x['first_difference']}",
        )
        for x in (part.get("examples") or ())[:_EXAMPLES]
    )
    return [*blocks, Examples(rows)] if rows else blocks


def instruction_table(rows: Sequence[Data]) -> Table:
    """What both models write when they are told to."""
    lines = [
        (
            words(Path(str(x["source"])).name),
            cells.number(x.get("prompts")),
            cells.shares(x.get("win_rate")),
            cells.shares(x.get("identical")),
            cells.interval(x.get("base_length"), 3),
            cells.interval(x.get("ours_length"), 3),
            cells.shares(x.get("base_repetition")),
            cells.shares(x.get("ours_repetition")),
        )
        for x in rows
    ]
    columns = (
        "instructions",
        "prompts",
        "win rate, a proxy",
        "equal answers",
        "tokens, original",
        "tokens, compressed",
    )
    note = "Repeated: share of an answer's 4-grams that occurred before in it."
    note = " ".join([*dict.fromkeys(f"{str(x['note']).capitalize()}." for x in rows if x.get("note")), note])
    repeated = ("repeated, original", "repeated, compressed")
    return table((*columns, *repeated), lines, "Answers to instructions.", note=note)


def _instructions(rows: Sequence[Data]) -> list[Block]:
    if not rows:
        return []
    answers = [x for row in rows for x in row.get("examples") or ()][:_EXAMPLES]
    examples = tuple(example(str(x["prompt"]), str(x["ours"]), str(x["base"]), "") for x in answers)
    judged = judged_table(rows)
    return [instruction_table(rows), *([judged] if judged.rows else []), *([Examples(examples)] if examples else [])]


def _worst(rows: Sequence[Data]) -> list[Block]:
    if not rows:
        return []
    lines = [
        (
            words(f"…{str(x.get('text') or '')[-90:]}"),
            words(_visible(x.get("token"))),
            words(_visible(x.get("theirs"))),
            words(_visible(x.get("ours"))),
            cells.number(x.get("kl"), 3),
        )
        for x in rows[:_WORST]
    ]
    columns = ("after", "came", "original preferred", "compressed preferred", "KL, nats")
    return [table(columns, lines, "The tokens on which both models differ most.")]


def _visible(token: object) -> str | None:
    """A token with its white space made visible."""
    return None if token is None else str(token).replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
