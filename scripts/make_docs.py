#!/usr/bin/env python3
"""Write docs/methods/ from the docstrings of the methods and from their measured figures, and docs/metrics.md from
those of the metrics and benchmarks.

    python scripts/make_docs.py [--check] [--root CHECKOUT]

--check writes nothing and ends with status 1 where a page is missing, old, or of a method that is gone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lilliput.methods import discover, measured
from lilliput.recipe import page
from lilliput.studies import index as metrics

PICTURE = "![KL divergence of the runs below against their bits per weight](measured.svg)"


def pages() -> dict[str, str]:
    """Path in docs/ to content."""
    methods = [method for _, method in sorted(discover().items())]
    lines = ["# Methods", "", "Written by `scripts/make_docs.py` from the method files; do not edit.", ""]
    lines += ["| method | verb | writes | what it does |", "| --- | --- | --- | --- |"]
    lines += [f"| [{m.name}]({m.name}.md) | `{m.spec.verb}` | {m.spec.writes} | {m.summary} |" for m in methods]
    figures = measured.figures()
    lines += ["", "## Measured", "", figures["protocol"], "", PICTURE, "", *measured.table(figures["rows"])]
    return {
        "metrics.md": measuring(),
        "methods/index.md": "\n".join(lines) + "\n",
        **{f"methods/{m.name}.md": page.page(m) for m in methods},
    }


def measuring() -> str:
    """The page of all metrics and benchmarks."""
    listed = list(metrics.discover().values())
    lines = [
        "# Metrics and benchmarks",
        "",
        "Written by `scripts/make_docs.py` from the files that measure; do not edit.",
    ]
    lines += ["`lilliput metrics` prints the same.", "", "| metric | what it is | covers |", "| --- | --- | --- |"]
    lines += [f"| [{x.name}](#{x.name}) | {x.summary} | {', '.join(x.metric.covers)} |" for x in listed]
    return "\n".join([*lines, "", *(f"#{metrics.page(x)}" for x in listed)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the pages are current")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="the checkout")
    options = parser.parse_args(arguments)
    folder = options.root / "docs"
    content = pages()
    paths = [*folder.glob("methods/*.md"), *folder.glob("metrics.md")]
    current = {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    old = sorted(name for name in {*content, *current} if content.get(name) != current.get(name))
    if options.check:
        if old:
            sys.exit(f"error: not current in {folder}: {', '.join(old)}; run python scripts/make_docs.py")
        return
    (folder / "methods").mkdir(parents=True, exist_ok=True)
    for name in old:
        if name in content:
            (folder / name).write_text(content[name], encoding="utf-8")
        else:
            (folder / name).unlink()
    print(f"{len(old)} of {len(content)} pages changed in {folder}")


if __name__ == "__main__":
    main()
