#!/usr/bin/env python3
"""Write a new method and its reference test: a small method that works and passes, to be replaced piece by piece.

    python scripts/new_method.py FAMILY NAME [--root CHECKOUT]

FAMILY is the folder of a verb: weight (one linear at a time), rewrite (a block that keeps its function), fit (the
linears of a block together), allocate and search (who gets how much of a budget, by scores or by trying), choose (which
grid of a menu each linear gets), learn (a rotation of the whole model), edit (what leaves the model), repair (what
the blocks of an edited model become), behaviour (what the written model leaves out while it runs), inputs (how what
enters a linear is rounded), cache (how it stores keys and values), train (what is trained of a linear), adapter (what
is trained beside a finished folder), objective (what training minimises). NAME is what recipes call the method.
Every place to change is marked with "replace:". The templates are files of scripts/templates.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

TEMPLATES = Path(__file__).resolve().parent / "templates"
METHOD = "my_method"  # what the templates call the module; the method is called alike, with dashes
FAMILIES = tuple(sorted(path.parent.name for path in TEMPLATES.glob(f"*/{METHOD}.py")))


def write(root: Path, family: str, name: str) -> tuple[Path, Path]:
    """The method's file and its test's, below `root`. Raises SystemExit with the reason where they cannot be."""
    if family not in FAMILIES:
        sys.exit(f"error: no family '{family}': choose one of {', '.join(FAMILIES)}")
    if re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) is None:
        sys.exit(f"error: '{name}' is no name for a method: small letters, digits and single dashes, such as my-method")
    module = name.replace("-", "_")
    methods = root / "src" / "lilliput" / "methods"
    existing = list(methods.glob(f"*/{module}.py"))
    if not methods.is_dir():
        sys.exit(f"error: {root} is no checkout of lilliput: {methods} does not exist")
    if existing:
        sys.exit(f"error: there is a method '{name}' already: {existing[0]}")
    files = (methods / family / f"{module}.py", root / "tests" / "methods" / family / f"test_{module}.py")
    for path, template in zip(files, (f"{METHOD}.py", f"test_{METHOD}.py"), strict=True):
        text = (TEMPLATES / family / template).read_text(encoding="utf-8")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace(METHOD, module).replace(METHOD.replace("_", "-"), name), encoding="utf-8")
    return files


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", help=", ".join(FAMILIES))
    parser.add_argument("name", help="what recipes call it, such as my-method")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="the checkout")
    options = parser.parse_args(arguments)
    method, test = write(options.root, options.family, options.name)
    print(f"wrote {method}\nwrote {test}\nrun: pytest {test}")


if __name__ == "__main__":
    main()
