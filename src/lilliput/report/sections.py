"""The sections of the page, each from its part of the evidence; None where that part was not measured."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lilliput.report import cells, figures
from lilliput.report.blocks import Block, Code, Fold, Prose, Section, Tree
from lilliput.report.cells import Cell, Table, table, words
from lilliput.report.figures import Row
from lilliput.report.svg import Picture

Data = Mapping[str, Any]
TENSORS = 3000  # rows of the per-tensor table; more make a page that phones cannot open
OPERATORS = 600
_SENTENCES = 6
_FASTER = 1.05  # less is not felt
_PLACE = re.compile(r"^On .* at batch \d+ and [\d,]+ tokens ")
BARS = (("base", "original"), ("ours", "compressed"))


def recipe(evidence: Data) -> Section | None:
    part = evidence.get("recipe")
    if not part:
        return None
    steps = part.get("steps") or ()
    rows = [
        (words(f"{i}. {x.get('method')}"), words(x.get("target")), words(x.get("options")), words(x.get("where")))
        for i, x in enumerate(steps, 1)
    ]
    blocks: list[Block] = [table(("step", "target", "options", "where"), rows)] if rows else []
    if part.get("text"):
        blocks.append(Code("As YAML", str(part["text"])))
    return Section("recipe", "Recipe", blocks, " then ".join(str(x.get("method")) for x in steps))


def size(evidence: Data) -> Section | None:
    part = evidence.get("size")
    if not part:
        return None
    kinds = sorted(part.get("by_kind") or (), key=lambda x: -x["bytes"])
    whole = {"kind": "whole model", "bytes": part.get("bytes"), "base_bytes": part.get("base_bytes")}
    entries = [x for x in (whole, *kinds) if x["bytes"] is not None]
    data = table(
        ("kind", "tensors", "original", "compressed"),
        [
            (words(x["kind"]), cells.number(x.get("tensors")), cells.size(x.get("base_bytes")), cells.size(x["bytes"]))
            for x in entries
        ],
    )
    groups = [
        (
            str(x["kind"]),
            [
                (float(x[key]), cells.size(x[key]).text, colour)
                for key, colour in (("base_bytes", "base"), ("bytes", "ours"))
                if x.get(key) is not None
            ],
        )
        for x in entries
    ]
    blocks: list[Block] = []
    if groups:
        caption = "Bytes on disk by kind of tensor."
        drawings = figures.bars("size", groups)
        blocks.append(Picture(*drawings, label(caption, data), caption, data, BARS))
    return Section("size", "Size", [*blocks, _sizes(part)])


def _sizes(part: Data) -> Table:
    flops, base = part.get("flops_per_token") or {}, part.get("base_flops_per_token") or {}
    count, ratio = cells.number, part.get("compression_ratio")
    kept = part.get("base_kv_bytes_per_token"), part.get("kv_bytes_per_token")
    rows = [
        ("bytes on disk", cells.size(part.get("base_bytes")), cells.size(part.get("bytes"))),
        ("bytes in RAM", cells.size(part.get("base_ram_bytes")), cells.size(part.get("ram_bytes"))),
        ("parameters", count(part.get("base_parameters")), count(part.get("parameters"))),
        ("bits per weight, compressed linears", Cell(""), count(part.get("bits_per_weight"), 3)),
        ("bits per weight, whole model", Cell(""), count(part.get("model_bits_per_weight"), 3)),
        ("times smaller", Cell(""), Cell(cells.MISSING) if ratio is None else Cell(f"{ratio:.2f}×", ratio)),
        ("FLOPs per token, prefill", cells.count(base.get("prefill")), cells.count(flops.get("prefill"))),
        ("FLOPs per token, decode", cells.count(base.get("decode")), cells.count(flops.get("decode"))),
        ("multiplications saved per token", Cell(""), cells.count(part.get("macs_saved"))),
        ("share of multiplications saved", Cell(""), cells.share(part.get("macs_saved_share"))),
        ("KV cache per token", cells.size(kept[0]), cells.size(kept[1])),
    ]
    lines = [(words(name), a, b) for name, a, b in rows if a.value is not None or b.value is not None]
    return table(("", "original", "compressed"), lines)


def speed(evidence: Data) -> Section | None:
    part = evidence.get("speed")
    if not part:
        return None
    phases = [(name, part[name]) for name in ("prefill", "decode") if part.get(name)]
    data = speed_table(part)
    blocks: list[Block] = []
    lines = [(name, x["speedup"]) for name, x in phases if x.get("speedup")]
    if lines:
        caption = "Measured speed-up over the original; right of the line is faster."
        rows = [Row(name, x["value"], x["low"], x["high"], cells.times(x).line, faster(x)) for name, x in lines]
        drawings = figures.forest("speed", rows, "times as fast as the original", 1.0)
        blocks.append(Picture(*drawings, label(caption, data), caption, data))
    elif phases:
        blocks.append(data)
    used = use_table(part)
    if used.rows:
        blocks.append(used)
    runs = f"{part['runs']} runs of each, interleaved" if part.get("runs") else ""
    how = [(key, part.get(key)) for key in ("batch", "dtype", "device", "threads")]
    summary = ", ".join([x for x in [runs] if x] + [f"{key} {value}" for key, value in how if value is not None])
    return Section("speed", "Speed", blocks, f"{summary}." if summary else "")


def use_table(part: Data) -> Table:
    """What the time gives: tokens, the share of the device's peak (MFU), and the memory it takes."""
    rows = (
        ("tokens per second", cells.number, "throughput"),
        ("model FLOPs utilisation (MFU)", cells.share, "mfu"),
        ("peak memory", cells.size, "peak_rss_bytes"),
    )
    lines = [(words(name), show(part.get(f"base_{key}")), show(part.get(key))) for name, show, key in rows]
    lines.append((words("measured peak of the device, FLOP/s"), Cell(""), cells.count(part.get("peak_flops"))))
    return table(("", "original", "compressed"), [line for line in lines if line[2].value is not None])


def speed_table(part: Data) -> Table:
    """Measured times of each phase."""
    whose = (("original", "base_seconds"), ("compressed", "seconds"))
    which = (("p50", "median"), ("p90", "p90"), ("p95", "p95"))
    columns = tuple(f"{who}, {caption}" for who, _ in whose for caption, _ in which)
    keys = [(key, q) for _, key in whose for _, q in which]
    return table(
        ("phase", "tokens", *columns, "speed-up"),
        [
            (
                words(name),
                cells.number(part[name].get("tokens")),
                *(cells.brief((part[name].get(key) or {}).get(q)) for key, q in keys),
                cells.times(part[name].get("speedup")),
            )
            for name in ("prefill", "decode")
            if part.get(name)
        ],
        note="Latency of a prefill over the rounds, and of a decoded token over all of them: median and percentiles.",
    )


def roofline(evidence: Data) -> Section | None:
    rows: Sequence[Data] = (evidence.get("roofline") or {}).get("rows") or ()
    if not rows:
        return None
    compared = [row for row in rows if row.get("speedup") is not None]
    places: dict[str, list[Data]] = {}
    for row in compared:
        places.setdefault(f"{row['device']}, batch {row['batch']}, context {row['context']:,}", []).append(row)
    colours = {"prefill": "second", "decode": "ours"}
    groups = [
        (place, [(float(x["speedup"]), f"{x['speedup']:.2f}×{_unfit(x)}", colours[x["phase"]]) for x in entries])
        for place, entries in places.items()
    ]
    columns = (
        "device",
        "batch",
        "context",
        "phase",
        "original",
        "compressed",
        "speed-up",
        "bound by",
        "memory",
        "in words",
    )
    data = table(
        columns,
        [
            (
                words(x["device"]),
                cells.number(x["batch"]),
                cells.number(x["context"]),
                words(x["phase"]),
                cells.brief(x.get("base_seconds")),
                cells.brief(x.get("seconds")),
                Cell(cells.MISSING) if x.get("speedup") is None else Cell(f"{x['speedup']:.2f}×", x["speedup"]),
                words(x.get("bound")),
                words(_unfit(x).strip()),
                words(x.get("sentence")),
            )
            for x in rows
        ],
    )
    caption = "Predicted speed-up by device and phase; the line is the original's speed."
    legend = (("second", "prefill"), ("ours", "decode"))
    blocks: list[Block] = [data]
    if groups:
        drawings = figures.bars("roofline", groups, 1.0)
        blocks = [Picture(*drawings, label(caption, data), caption, data, legend)]
    slow = [x for x in compared if x["speedup"] < _FASTER] or rows
    sentences = _in_short(slow, rows)
    if sentences:
        blocks.append(Prose(sentences[:_SENTENCES]))
    operators = [
        (
            words(x["device"]),
            words(f"{x['phase']}, batch {x['batch']}, context {x['context']:,}"),
            words(o["name"]),
            cells.count(o.get("flops")),
            cells.size(o.get("bytes")),
            cells.brief(o.get("seconds")),
            words(o.get("bound")),
        )
        for x in rows
        for o in x.get("operators") or ()
    ]
    if operators:
        note = "" if len(operators) <= OPERATORS else f"{len(operators) - OPERATORS:,} more rows are in the JSON."
        names = ("device", "phase", "operator", "FLOPs", "bytes", "time", "bound by")
        blocks.append(Fold("Operators", table(names, operators[:OPERATORS], note=note)))
    return Section("roofline", "Roofline", blocks, "What shapes and format allow on each device; not measured.")


def _in_short(some: Sequence[Data], rows: Sequence[Data]) -> tuple[str, ...]:
    """What the sentences of `some` predictions say, each thing once, with the devices that it is said of and, where
    other predictions of a device and phase say something else, in how many of them."""
    statements: dict[str, list[tuple[str, str]]] = {}
    for x in some:
        if x.get("sentence"):
            what = _PLACE.sub("", str(x["sentence"]))
            statements.setdefault(what[:1].upper() + what[1:], []).append((str(x["device"]), str(x["phase"])))
    every = Counter((str(x["device"]), str(x["phase"])) for x in rows)
    lines = []
    for what, places in statements.items():
        counts = Counter(places)
        parts = [
            name if n == every[name, phase] else f"{name} in {n} of {every[name, phase]}"
            for (name, phase), n in counts.items()
        ]
        lines.append(f"{what.removesuffix('.')} ({', '.join(parts)}).")
    return tuple(lines)


def _unfit(row: Data) -> str:
    """What a prediction is worth where the device's memory is too small."""
    if row.get("fits") is False:
        return " does not fit"
    return " original does not fit" if row.get("base_fits") is False else ""


def loss(evidence: Data) -> Section | None:
    part = evidence.get("loss")
    if not part:
        return None
    blocks: list[Block] = []
    suspects = part.get("suspects") or ()
    if suspects:
        lines = [
            f"{x['tensor']}: {x['reason']}" + (f" (factor {x['factor']:.4g})" if x.get("factor") is not None else "")
            for x in suspects
        ]
        blocks.append(Prose(tuple(lines), "bad", "Apparently damaged"))
    linears, per_block = part.get("linears") or (), part.get("blocks") or ()
    if linears:
        blocks.append(_heat(linears))
    if per_block:
        blocks.append(_blocks(per_block))
    if part.get("note"):
        blocks.append(Prose((str(part["note"]),)))
    total = part.get("total_kl")
    lead = f"The shares divide a KL divergence of {total:.3g} nats per token." if total is not None else ""
    return Section("loss", "Where the loss comes from", blocks, lead)


def _measure(rows: Sequence[Data]) -> tuple[str, str]:
    """Key and words of what the rows tell best."""
    keys = {
        "share": "share of the loss",
        "output_error": "error of the outputs",
        "weight_error": "error of the weights",
    }
    return next(((k, v) for k, v in keys.items() if any(x.get(k) is not None for x in rows)), ("share", keys["share"]))


def _heat(linears: Sequence[Data]) -> Picture:
    key, name = _measure(linears)
    cell: dict[tuple[int, str], tuple[float, str, bool]] = {}
    for x in linears:
        at = (int(x["block"]), str(x["role"]))
        value = float(x.get(key) or 0.0)
        before, _, exact = cell.get(at, (0.0, "", False))
        # Experts share a role: their shares add up, of their errors the largest counts.
        total = before + value if key == "share" else max(before, value)
        text = f"block {at[0]}, {at[1]}: {_amount(key, total)}"
        cell[at] = (total, text, exact or (key == "share" and bool(x.get("exact"))))
    roles = list(dict.fromkeys(role for _, role in cell))
    most = max(value for value, _, _ in cell.values())
    ordered = sorted(linears, key=lambda x: -float(x.get(key) or 0.0))
    data = table(
        ("linear", "share", "how", "error of weights", "of outputs", "SNR, dB", "bits", "methods"),
        [
            (
                words(x["name"]),
                cells.share(x.get("share")),
                words(None if x.get("share") is None else "exact" if x.get("exact") else "estimated"),
                cells.number(x.get("weight_error"), 3),
                cells.number(x.get("output_error"), 3),
                cells.number(x.get("snr_db"), 3),
                cells.number(x.get("bits"), 3),
                words(x.get("methods")),
            )
            for x in ordered[:TENSORS]
        ],
        sortable=True,
        note=_left_out(len(ordered)),
    )
    marked = any(exact for _, _, exact in cell.values())
    caption = f"{name.capitalize()} by block and linear." + (" Dots: measured by re-running." if marked else "")
    drawings = figures.heat("heat", cell, roles)
    return Picture(*drawings, label(caption, data), caption, data, (), (_amount(key, 0.0), _amount(key, most)))


def _blocks(rows: Sequence[Data]) -> Picture:
    key, name = _measure(rows)
    values = [
        (int(x["block"]), float(x[key]), f"block {x['block']}: {_amount(key, x[key])}")
        for x in rows
        if x.get(key) is not None
    ]
    data = table(
        ("block", "share", "error of outputs", "SNR, dB"),
        [
            (
                cells.number(x["block"]),
                cells.share(x.get("share")),
                cells.number(x.get("output_error"), 3),
                cells.number(x.get("output_snr_db"), 3),
            )
            for x in rows
        ],
    )
    caption = f"{name.capitalize()} by block; the largest stands out."
    return Picture(*figures.columns("blocks", values, name, key == "share"), label(caption, data), caption, data)


def tensors(evidence: Data) -> Section | None:
    rows = evidence.get("tensors") or ()
    if not rows:
        return None
    lines = [
        (
            words(x["name"]),
            words(x.get("kind")),
            words(x.get("dtype")),
            Cell("×".join(str(n) for n in x.get("shape") or ())),
            cells.size(x.get("bytes")),
            cells.number(x.get("bits"), 3),
            cells.number(x.get("error"), 3),
        )
        for x in rows[:TENSORS]
    ]
    columns = ("tensor", "kind", "dtype", "shape", "size", "bits", "error")
    return Section(
        "tensors",
        "Every tensor",
        [table(columns, lines, sortable=True, note=_left_out(len(rows)))],
        f"{len(rows):,} stored tensors.",
    )


def provenance(evidence: Data) -> Section | None:
    part = dict(evidence.get("provenance") or {})
    heads = {key: evidence[key] for key in ("model", "against", "created") if evidence.get(key)}
    return Section("provenance", "Provenance", [Tree(heads | part)]) if heads or part else None


def notes(evidence: Data) -> Section | None:
    lines = tuple(str(x) for x in evidence.get("notes") or ())
    return Section("notes", "Notes", [Prose(lines)]) if lines else None


def _left_out(count: int) -> str:
    return "" if count <= TENSORS else f"{count - TENSORS:,} more rows are in the JSON."


def _amount(key: str, value: float) -> str:
    return f"{100 * value:.3g} %" if key == "share" else f"{value:.3g}"


def faster(speedup: Data) -> str:
    return "ok" if speedup["low"] > 1 else "bad" if speedup["high"] < 1 else "unsure"


def label(caption: str, data: Table) -> str:
    """What a figure shows, for those who hear the page: its caption and its first rows."""
    rows = ["; ".join(cell.line for cell in row if cell.text != cells.MISSING) for row in data.rows[:4]]
    return f"{caption} {'. '.join(rows)}."
