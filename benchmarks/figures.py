"""The figures that `lilliput methods` and the documentation show, from raw results of quality.py.

    python benchmarks/figures.py benchmarks/methods.json

Writes src/lilliput/measured.json; `python scripts/make_docs.py` puts it onto the pages.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lilliput import recipe

PROTOCOL = (
    "SmolLM2-135M-Instruct off the grid of its packaged file, 32 x 512 calibration tokens of WikiText-2 validation, "
    "two cores. Perplexity (original {original:.2f}), ratio and KL: first 16 windows of 1,024 tokens of WikiText-2 "
    "test, float32; C4 and PTB validation: 8 windows each. Bits count all overhead of the compressed linears. Time: "
    "the whole run in bfloat16 forward passes of the calibration tokens, timed in the same process. Peak: above a "
    "fresh import."
)


def row(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """One entry of measured.json."""
    words = found["recipe"].split()
    steps = recipe.load(words[0]).steps
    test = found["test"]

    def interval(metric: str) -> list[float]:
        return [round(test[metric][key], 5) for key in ("value", "low", "high")]

    return {
        "name": name,
        "run": " ".join([Path(words[0]).name, *words[1:]]),
        "methods": list(dict.fromkeys(step.method for step in steps)),
        "bits_per_weight": round(found["bits_per_weight"], 4),
        "perplexity": round(test["perplexity"]["value"], 3),
        "ratio": interval("perplexity_ratio"),
        "kl": interval("kl"),
        "c4": round(found["c4"]["perplexity_ratio"]["value"], 4),
        "ptb": round(found["ptb"]["perplexity_ratio"]["value"], 4),
        "forwards": None if found.get("disturbed") else round(found["forwards"], 1),
        "peak_bytes": found["peak_rss_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    options = parser.parse_args()
    found = json.loads(options.results.read_text(encoding="utf-8"))
    rows = [row(name, x) for name, x in found.items() if "perplexity_ratio" in x.get("test", {})]
    first = next(x["test"] for x in found.values() if "perplexity_ratio" in x["test"])
    original = first["perplexity"]["value"] / first["perplexity_ratio"]["value"]
    rows.sort(key=lambda x: (-round(x["bits_per_weight"]), x["perplexity"]))
    out = Path(__file__).resolve().parent.parent / "src" / "lilliput" / "measured.json"
    plain = {"protocol": PROTOCOL.format(original=original), "rows": rows}
    out.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows)} rows in {out}")


if __name__ == "__main__":
    main()
