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
sys.argv = {line!r}
try:
    main()
except SystemExit as end:
    assert not end.code
print(json.dumps([x for x in ("torch", "transformers", "scipy") if x in sys.modules]), file=sys.stderr)
"""


def loaded(*line: str) -> list[str]:
    script = LOOK.format(line=["lilliput", *line])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stderr.strip().splitlines()[-1])
    return found


@pytest.mark.parametrize("line", [(), *((x,) for x in COMMANDS)], ids=" ".join)
def test_help_needs_no_library(line: tuple[str, ...]) -> None:
    assert loaded(*line, "--help") == []


def test_methods_are_listed_without_transformers() -> None:
    assert "transformers" not in loaded("methods")


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
