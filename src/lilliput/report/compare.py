"""Several compressed models of one base side by side: what each costs and saves, and which none of the others beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lilliput.errors import DataError
from lilliput.metrics.metric import Metric
from lilliput.report import cells, figures
from lilliput.report.blocks import Block, Prose, Section
from lilliput.report.cells import Cell, Table, table, words
from lilliput.report.page import BADGES, page
from lilliput.report.svg import Picture, require
from lilliput.report.verdict import verdict

Data = Mapping[str, Any]
_NO_CHANGE = {"value": 1.0, "low": 1.0, "high": 1.0}


def comparison_rows(evidences: Sequence[Data]) -> list[dict[str, Any]]:
    """One row for each model, in the given order, on the first data set that all of them were measured on.

    Keys: name, model, level (of the verdict), headline, data (name of the data set), bytes, base_bytes,
    compression_ratio, bits_per_weight, model_bits_per_weight, perplexity, perplexity_ratio, kl, agreement, speedup
    (decode, else prefill; intervals as {value, low, high}), recipe (methods), best_size, best_speed: whether no other
    model is at least as small (as fast) and loses at most as much, one of them strictly. Speeds whose intervals overlap
    count as equal. `loss` is what they are compared by: "kl" where all have it, else "perplexity_ratio"; its value, not
    its interval, counts. Figures that were not measured are None, and such a model is neither best nor in the way of
    others.

    Raises DataError for fewer than two models, models that were compared with different originals, or no data set (by
    fingerprint) in common.
    """
    if len(evidences) < 2:
        raise DataError(f"{len(evidences)} model cannot be compared: give two or more that were evaluated.")
    bases = dict.fromkeys(str(x["against"]) for x in evidences if x.get("against"))
    if len(bases) > 1:
        raise DataError(f"these models were measured against different originals ({', '.join(bases)}): use one base.")
    texts = [common(evidences, x) for x in evidences]
    loss = "kl" if all(x.get("kl") for x in texts) else "perplexity_ratio"
    rows = [_row(x, data, loss) for x, data in zip(evidences, texts, strict=True)]
    for name, row in zip(names(rows), rows, strict=True):
        row["name"] = name
    losses = [_value(row[loss]) for row in rows]
    large = [None if row["bytes"] is None else (row["bytes"], row["bytes"]) for row in rows]
    slow = [None if row["speedup"] is None else (-row["speedup"]["high"], -row["speedup"]["low"]) for row in rows]
    for i, row in enumerate(rows):
        row["best_size"] = best(i, large, losses)
        row["best_speed"] = best(i, slow, losses)
    return rows


def render_comparison(evidences: Sequence[Data]) -> str:
    """The comparison as one self-contained page, as `lilliput.report.page.render` makes them.

    Raises DataError as `comparison_rows` does, LilliputError where matplotlib or jinja2 is not installed.
    """
    require()
    rows = comparison_rows(evidences)
    base = next((str(x["against"]) for x in evidences if x.get("against")), None)
    data = rows[0]["data"]
    blocks: list[Block] = [comparison_table(rows)]
    sections = [Section("models", "Models", blocks, f"Measured on {data}." if data else "")]
    plots = [x for x in (_by_size(rows), _by_speed(rows)) if x is not None]
    if plots:
        lead = (
            "Filled and joined: no other model is better in both. Lines are 95 % intervals; speeds where they overlap "
            "are equal."
        )
        sections.append(Section("pareto", "What the loss buys", plots, lead))
    reasons = [f"{row['name']}: {row['headline']}" for row in rows]
    sections.append(Section("verdicts", "Verdicts", [Prose(tuple(reasons))]))
    return page(
        "compare.html.j2",
        title=f"{len(rows)} models compared",
        about=f"Original: {base}" if base else "",
        sections=sections,
        headline=headline(rows),
        level="ok" if any(row["level"] == "ok" for row in rows) else "unsure",
    )


def headline(rows: Sequence[Data]) -> str:
    """The answer in a sentence: the smallest model without a loss, or the models that none beats."""
    fine = [row for row in rows if row["level"] == "ok" and row["bytes"] is not None and row["model"] != row["base"]]
    if fine:
        least = min(fine, key=lambda row: float(row["bytes"]))
        return f"{least['name']} is the smallest without a loss worth mentioning: {cells.size(least['bytes']).text}."
    best = [str(row["name"]) for row in rows if row["best_size"]]
    if not best:
        return "Size and loss were not measured for all, so none can be preferred."
    return f"All have a loss. By size and loss, none of the others beats {_and(best)}."


def comparison_table(rows: Sequence[Data]) -> Table:
    """All rows as a table, for the page and the terminal."""
    columns = ("model", "verdict", "perplexity, × original", "KL, nats", "size", "smaller", "speed, × original")
    return table(
        (*columns, "best by", "bits per weight", "same top token", "recipe"),
        [
            (
                words(row["name"]),
                words(BADGES[row["level"]], row["level"]),
                cells.interval(row["perplexity_ratio"]),
                cells.interval(row["kl"], 3),
                cells.size(row["bytes"]),
                Cell(cells.MISSING)
                if row["compression_ratio"] is None
                else Cell(f"{row['compression_ratio']:.2f}×", row["compression_ratio"]),
                cells.times(row["speedup"]),
                words(", ".join(f"★\N{NO-BREAK SPACE}{x}" for x in ("size", "speed") if row[f"best_{x}"])),
                cells.number(row["bits_per_weight"], 3),
                cells.shares(row["agreement"]),
                words(row["recipe"]),
            )
            for row in rows
        ],
        sortable=True,
        note="★ Best: no other model is at least as good in both size (speed) and loss, and better in one. Speeds "
        "whose intervals overlap are equal.",
    )


def _row(evidence: Data, data: Data, loss: str) -> dict[str, Any]:
    size, speed = evidence.get("size") or {}, evidence.get("speed") or {}
    answer = evidence.get("verdict") or verdict(evidence)
    itself = evidence.get("model") is not None and evidence.get("model") == evidence.get("against")
    gains = [(speed.get(phase) or {}).get("speedup") for phase in ("decode", "prefill")]
    keys = ("bytes", "base_bytes", "compression_ratio", "bits_per_weight", "model_bits_per_weight")
    return {
        "name": "",
        "model": str(evidence.get("model") or evidence.get("title") or ""),
        "base": evidence.get("against"),
        "level": answer["level"],
        "headline": answer["headline"],
        "data": data.get("name"),
        **{key: size.get(key) for key in keys},
        **{key: data.get(key) for key in ("perplexity", "perplexity_ratio", "kl", "agreement")},
        "speedup": next((x for x in gains if x), _NO_CHANGE if itself else None),
        "recipe": [str(x.get("method")) for x in (evidence.get("recipe") or {}).get("steps") or ()],
        "loss": loss,
    }


def common(evidences: Sequence[Data], evidence: Data) -> Data:
    """The rows of `evidence` for the first data set that all have; {} where none has any."""
    every = [{_key(row): row for row in (x.get("quality") or {}).get("data") or ()} for x in evidences]
    if not any(every):
        return {}
    shared = next((key for key in every[0] if all(key in by_data for by_data in every)), None)
    if shared is None:
        texts = [", ".join(str(row["name"]) for row in by_data.values()) or "none" for by_data in every]
        named = "; ".join(f"{x.get('model')} on {text}" for x, text in zip(evidences, texts, strict=True))
        raise DataError(f"these models were measured on no text in common ({named}): evaluate all on the same --data.")
    return next(by_data[shared] for x, by_data in zip(evidences, every, strict=True) if x is evidence)


def _key(row: Data) -> tuple[object, ...]:
    return row.get("fingerprint") or row.get("name"), row.get("windows")


def names(rows: Sequence[Data]) -> list[str]:
    """The last part of each path, or as much of it as tells them apart."""
    paths = [[part for part in str(row["model"]).split("/") if part] or ["model"] for row in rows]
    for count in range(1, max(len(path) for path in paths) + 1):
        short = ["/".join(path[-count:]) for path in paths]
        if len(set(short)) == len(short):
            return short
    return [f"{'/'.join(path)} ({i})" for i, path in enumerate(paths, 1)]


def best(i: int, costs: Sequence[tuple[float, float] | None], losses: Sequence[float | None]) -> bool:
    """Costs as intervals; those that overlap are equal."""
    cost, loss = costs[i], losses[i]
    if cost is None or loss is None:
        return False
    return not any(
        a is not None and b is not None and ((a[0] <= cost[1] and b < loss) or (a[1] < cost[0] and b <= loss))
        for a, b in zip(costs, losses, strict=True)
    )


def _value(interval: Data | None) -> float | None:
    return None if interval is None else float(interval["value"])


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _plot(rows: Sequence[Data], name: str, key: str, best: str, x_axis: str, caption: str) -> Picture | None:
    loss = rows[0]["loss"]
    measured = [(row, row[key], row[loss]) for row in rows if row[key] is not None and row[loss] is not None]
    if len(measured) < 2:
        return None
    points = [
        figures.Point(
            str(row["name"]), *_cost(cost), loss_value["value"], loss_value["low"], loss_value["high"], bool(row[best])
        )
        for row, cost, loss_value in measured
    ]
    y_axis = "KL from the original, nats" if loss == "kl" else "perplexity ratio"
    data = table(
        ("model", x_axis, y_axis, "none better"),
        [
            (
                words(row["name"]),
                cells.times(cost) if isinstance(cost, Mapping) else cells.size(cost),
                cells.interval(loss_value, 3 if loss == "kl" else 4),
                words("★" if row[best] else ""),
            )
            for row, cost, loss_value in measured
        ],
    )
    drawings = figures.pareto(name, points, x_axis, y_axis, upwards=best == "best_speed")
    description = f"{caption} {'. '.join('; '.join(cell.line for cell in row) for row in data.rows)}."
    return Picture(
        *drawings, description, caption, data, (("ours", "none better in both"), ("muted", "another is better"))
    )


def _cost(cost: Any) -> tuple[float, float, float]:
    """Value and interval as they are drawn."""
    if isinstance(cost, Mapping):
        return float(cost["value"]), float(cost["low"]), float(cost["high"])
    megabytes = float(cost) / 1e6
    return megabytes, megabytes, megabytes


def _by_size(rows: Sequence[Data]) -> Picture | None:
    return _plot(rows, "by-size", "bytes", "best_size", "size, MB", "Size against loss: down and left is better.")


def _by_speed(rows: Sequence[Data]) -> Picture | None:
    axis = "times as fast as the original"
    return _plot(rows, "by-speed", "speedup", "best_speed", axis, "Speed against loss: down and right is better.")


METRIC = Metric(
    how="lilliput compare DIR DIR --against MODEL --html FILE",
    key="models[].best_size, models[].best_speed",
    unit="whether none is better in both",
    interval="those of the figures compared",
    covers=("scaling-law",),
)
