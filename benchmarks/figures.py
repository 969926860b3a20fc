"""The figures that `lilliput methods` and the documentation show, from raw results of quality.py.

    python benchmarks/figures.py benchmarks/methods.json

Writes src/lilliput/methods/measured.json, which `python scripts/make_docs.py` puts onto the pages, and the picture.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lilliput.recipe.load import load

MOST_BITS, MOST_KL = 5.5, 4.0  # what lies beyond is in the table
PROTOCOL = (
    "SmolLM2-135M-Instruct off the grid of its packaged file, 32 x 512 calibration tokens of WikiText-2 validation, "
    "two cores. Perplexity (original {original:.2f}), ratio and KL: first 16 windows of 1,024 tokens of WikiText-2 "
    "test, float32; C4 and PTB validation: 8 windows each. Bits count all overhead of the compressed linears. Time: "
    "the whole run in bfloat16 forward passes of the calibration tokens, timed in the same process. Peak: above a "
    "fresh import."
)


def row(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """One entry of measured.json."""
    words = figures["recipe"].split()
    steps = load(words[0]).steps
    test = figures["test"]

    def interval(metric: str) -> list[float]:
        return [round(test[metric][key], 5) for key in ("value", "low", "high")]

    return {
        "name": name,
        "run": " ".join([Path(words[0]).name, *words[1:]]),
        "methods": list(dict.fromkeys(step.method for step in steps)),
        "bits_per_weight": round(figures["bits_per_weight"], 4),
        "perplexity": round(test["perplexity"]["value"], 3),
        "ratio": interval("perplexity_ratio"),
        "kl": interval("kl"),
        "c4": round(figures["c4"]["perplexity_ratio"]["value"], 4),
        "ptb": round(figures["ptb"]["perplexity_ratio"]["value"], 4),
        "forwards": None if figures.get("disturbed") else round(figures["forwards"], 1),
        "peak_bytes": figures["peak_rss_bytes"],
    }


def front(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that no other beats in bits and KL both, by bits."""
    best: list[dict[str, Any]] = []
    for one in sorted(rows, key=lambda x: (x["bits_per_weight"], x["kl"][0])):
        if not best or one["kl"][0] < best[-1]["kl"][0]:
            best.append(one)
    return best


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """KL against bits per weight; names where there is room, those that nothing beats first."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = [x for x in rows if x["bits_per_weight"] <= MOST_BITS and x["kl"][0] <= MOST_KL]
    best = front(rows)
    with matplotlib.rc_context({"svg.hashsalt": "measured", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(10, 6.5), layout="constrained", facecolor="white")
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.margins(x=0.08)
        axes.grid(which="both", color="0.92")
        axes.set_xlabel("bits per weight of the compressed linears, all overhead counted")
        axes.set_ylabel("KL divergence from the original, nats a token")
        axes.spines[["top", "right"]].set_visible(False)
        others = [x for x in rows if x not in best]
        axes.plot(*_places(others), "o", color="0.55", markersize=4)
        axes.plot(*_places(best), "o-", color="#0b6e4f", markersize=5, linewidth=1)
        canvas.draw()
        spots = [axes.transData.transform(place) for place in zip(*_places(rows), strict=True)]
        boxes = [(x - 3, y - 3, x + 3, y + 3) for x, y in spots]
        for one in [*best, *sorted(others, key=lambda x: x["kl"][0])]:
            place = axes.transData.transform((one["bits_per_weight"], one["kl"][0]))
            wide = 4.6 * len(one["name"])
            aside = ((6, -3), (-6 - wide, -3), (6, 5), (-6 - wide, -10), (-wide / 2, 6), (-wide / 2, -12))
            for right, up in aside[2:] + aside[:2] if one in best else aside:
                x, y = place[0] + right, place[1] + up
                box = (x, y, x + wide, y + 8)
                if all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in boxes):
                    boxes.append(box)
                    colour = "#0b6e4f" if one in best else "0.3"
                    at = axes.transData.inverted().transform((x, y))
                    axes.text(*at, one["name"], fontsize=7.5, color=colour)
                    break
        metadata = {"Date": None, "Creator": None}
        figure.savefig(out, format="svg", metadata=metadata)


def _places(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [x["bits_per_weight"] for x in rows], [x["kl"][0] for x in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    options = parser.parse_args()
    results = json.loads(options.results.read_text(encoding="utf-8"))
    rows = [row(name, x) for name, x in results.items() if "perplexity_ratio" in x.get("test", {})]
    first = next(x["test"] for x in results.values() if "perplexity_ratio" in x["test"])
    original = first["perplexity"]["value"] / first["perplexity_ratio"]["value"]
    rows.sort(key=lambda x: (-round(x["bits_per_weight"]), x["perplexity"]))
    root = Path(__file__).resolve().parent.parent
    out = root / "src" / "lilliput" / "methods" / "measured.json"
    plain = {"protocol": PROTOCOL.format(original=original), "rows": rows}
    out.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    draw(rows, root / "docs" / "methods" / "measured.svg")
    print(f"{len(rows)} rows in {out}")


if __name__ == "__main__":
    main()
