"""The report as one HTML page that needs nothing else: no network, no file beside it.

Names and texts of models are untrusted: everything is escaped, and a content security policy forbids any script but
the page's own, and any request. Equal evidence gives equal bytes. The evidence is described in docs/report.md.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.errors import LilliputError
from lilliput.report import cells, sections
from lilliput.report.behaviours import behaviours
from lilliput.report.blocks import Figure, Section, kind
from lilliput.report.quality import quality, ratio_tone
from lilliput.report.svg import HEATS, require
from lilliput.report.training import training
from lilliput.report.verdict import measured, verdict

if TYPE_CHECKING:
    from jinja2 import Environment

Data = Mapping[str, Any]
_TEMPLATES = Path(__file__).parent / "templates"
BADGES: Mapping[str, str] = {"ok": "✓ OK", "loss": "▼ LOSS", "unsure": "? UNSURE", "bad": "✕ BAD"}


def render(evidence: Data) -> str:
    """The page, UTF-8 text. Parts that the evidence lacks are left out; so is a verdict: it is then made here.

    Raises LilliputError where matplotlib or jinja2 is not installed.
    """
    require()
    sections_of = (
        sections.recipe(evidence),
        training(evidence),
        sections.size(evidence),
        quality(evidence),
        behaviours(evidence),
        sections.speed(evidence),
        sections.roofline(evidence),
        sections.loss(evidence),
        sections.tensors(evidence),
        sections.provenance(evidence),
        sections.notes(evidence),
    )
    answer = evidence.get("verdict") or verdict(evidence)
    return page(
        "report.html.j2",
        title=str(evidence.get("title") or evidence.get("model") or "Lilliput report"),
        sections=[section for section in sections_of if section is not None and section.blocks],
        verdict=answer,
        badge=BADGES[answer["level"]],
        figures=headline_figures(evidence),
        gates=gates(evidence),
        model=evidence.get("model"),
        against=evidence.get("against"),
        created=evidence.get("created"),
    )


def page(template: str, *, title: str, sections: Sequence[Section], **rest: object) -> str:
    """A template of this package with what every page needs: style, script and their policy."""
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    document = _environment().get_template(template)
    return document.render(title=title, sections=sections, script=script, script_hash=digest, heats=HEATS, **rest)


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["kind"] = kind
    environment.filters["whole"] = lambda text: str(text).replace(" %", "\u00a0%")  # no line ends before a unit
    environment.filters["drawn"] = Markup  # matplotlib has escaped what it wrote
    return environment


def headline_figures(evidence: Data) -> list[Figure]:
    """The four to six numbers below the verdict, of the data set that lost most."""
    size, speed = evidence.get("size") or {}, evidence.get("speed") or {}
    worst = next(iter(measured(evidence)), {})
    where = f"on {worst['name']}" if worst else ""
    figures = []
    if worst.get("perplexity_ratio"):
        ratio = worst["perplexity_ratio"]
        figures.append(
            Figure("perplexity, × original", f"{ratio['value']:.3f}", _span(ratio, 3, where), ratio_tone(ratio))
        )
    elif worst.get("perplexity"):
        figures.append(Figure("perplexity", f"{worst['perplexity']['value']:.4g}", where))
    if worst.get("kl"):
        figures.append(Figure("KL from original, nats", f"{worst['kl']['value']:.3g}", _span(worst["kl"], 3, where)))
    if worst.get("agreement"):
        same = {key: 100 * worst["agreement"][key] for key in ("value", "low", "high")}
        figures.append(Figure("same top token", f"{same['value']:.1f} %", _span(same, 3, where)))
    if size.get("bytes") is not None:
        ratio_of = size.get("compression_ratio")
        below = f"{ratio_of:.2f}× smaller" if ratio_of else ""
        if size.get("base_bytes"):
            below = f"{below}, was {cells.size(size['base_bytes']).text}".removeprefix(", ")
        figures.append(Figure("size on disk", cells.size(size["bytes"]).text, below))
    for phase in ("decode", "prefill"):
        gain = (speed.get(phase) or {}).get("speedup")
        if gain:
            figures.append(
                Figure(f"{phase} speed, × original", f"{gain['value']:.2f}×", _span(gain, 3, ""), sections.faster(gain))
            )
            break
    if size.get("bits_per_weight") is not None:
        whole = size.get("model_bits_per_weight")
        below = f"{whole:.3g} over the whole model" if whole is not None else ""
        figures.append(Figure("bits per weight", f"{size['bits_per_weight']:.3g}", below))
    return figures


def _span(x: Data, digits: int, where: str) -> str:
    return f"{x['low']:.{digits + 1}g} to {x['high']:.{digits + 1}g} {where}".strip()


def gates(evidence: Data) -> cells.Table | None:
    """The stated limits, one row each; None where none was stated."""
    rows = evidence.get("gates") or ()
    if not rows:
        return None
    return cells.table(
        ("gate", "result", "limit", "measured"),
        [
            (
                cells.words(x["name"]),
                cells.words("passed" if x["passed"] else "missed", "ok" if x["passed"] else "bad"),
                cells.number(x["limit"]),
                cells.number(x["value"]),
            )
            for x in rows
        ],
    )


def writable(path: Path) -> None:
    """Raises LilliputError where a page could not be written there, so that it is known before any work."""
    require()
    if not path.absolute().parent.is_dir():
        raise LilliputError(f"the folder {path.absolute().parent} does not exist: create it, or choose another --html")
    if path.is_dir():
        raise LilliputError(f"{path} is a folder: --html must name a file to write")


def write(path: Path, text: str) -> None:
    """A page by rename, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
