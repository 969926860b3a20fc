"""What the command line leaves alone until it is needed, and what the package gives nevertheless."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = (
    "compress",
    "plan",
    "eval",
    "compare",
    "verify",
    "methods",
    "metrics",
    "spread",
    "inspect",
    "generate",
    "mask",
    "serve",
)
LOOK = """
import json, sys
from lilliput.cli.main import main
for line in {lines!r}:
    sys.argv = ["lilliput", *line]
    try:
        main()
    except SystemExit as end:
        assert not end.code
    found = [x for x in ("torch", "transformers", "scipy") if x in sys.modules]
    print(json.dumps([" ".join(line), found]), file=sys.stderr)
"""


def loaded(*lines: tuple[str, ...]) -> dict[str, list[str]]:
    """Of command lines that one process carries out, one after the other, the libraries that were loaded by then."""
    script = LOOK.format(lines=lines)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found = dict(json.loads(x) for x in done.stderr.strip().splitlines()[-len(lines) :])
    assert set(found) == {" ".join(x) for x in lines}
    return found


def test_help_needs_no_library_and_a_list_of_methods_no_transformers() -> None:
    found = loaded(("--help",), *((x, "--help") for x in COMMANDS), ("methods",))
    assert "transformers" not in found.pop("methods")
    assert set(map(tuple, found.values())) == {()}


def test_every_name_is_there_and_the_submodule_of_the_same_name_too() -> None:
    script = """
import sys
import lilliput
assert "torch" not in sys.modules
from lilliput.plan.plan import Plan
assert callable(lilliput.plan) and callable(lilliput.compress)
from lilliput import *
assert compress is lilliput.compress and plan is lilliput.plan
assert all(x in dir(lilliput) and getattr(lilliput, x) is not None for x in lilliput.__all__)
from lilliput.machine import memory
assert memory._base and memory._base > 100 << 20  # all of the package was there when it was set
try:
    lilliput.nothing
except AttributeError as error:
    assert "nothing" in str(error)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_base_is_set_where_only_a_part_was_imported() -> None:
    script = """
from lilliput.machine import memory
assert memory._base is None
memory.based()
assert memory.peak_above_base() < memory._base
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.slow
def test_no_bars_of_other_libraries_in_a_log(tiny, tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps({"context": "a b", "choices": ["c", "d"], "label": 0}) + "\n")
    line = ["eval", tiny("llama"), "--windows", "2", "--tokens", "16", "--tasks", f"mine={items}", "--json"]
    environment = {k: v for k, v in os.environ.items() if not k.endswith(("PROGRESS_BARS", "TQDM_DISABLE"))}
    done = subprocess.run(
        [sys.executable, "-m", "lilliput", *map(str, line)], capture_output=True, text=True, env=environment, check=True
    )
    assert "%|" not in done.stderr
    assert "\r" not in done.stderr
    assert "blocks 4/4" in done.stderr
