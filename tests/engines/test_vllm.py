"""vLLM itself, where one is installed: what it computes from our folders, and that it serves them.

scripts/engine_env.py makes an environment for these tests; LILLIPUT_VLLM_PYTHON names its interpreter.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("LILLIPUT_VLLM_PYTHON") or (sys.executable if importlib.util.find_spec("vllm") else None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="no vLLM: scripts/engine_env.py vllm DIR, LILLIPUT_VLLM_PYTHON"),
]
TRIED = (
    "int4 sym",
    "int4 asym",
    "native: int3 asym",
    "native: tied table",
    "native: rotations",
    "native: experts",
    "native: Conv1D",
)


@cache
def measured() -> dict[str, dict[str, Any]]:
    """What the script finds, all cases in one process: importing vLLM takes longer than they do."""
    line = [sys.executable, str(ROOT / "scripts" / "check_engines.py"), *TRIED, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "LILLIPUT_VLLM_PYTHON": str(PYTHON)}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=True)
    return {row["name"]: row for row in json.loads(done.stdout)["cases"]}


@pytest.mark.parametrize("name", TRIED)
def test_vllm_computes_what_transformers_does(name: str) -> None:
    row = measured()[name]
    assert row["finding"] == "equal", row
    if row["rounding"] == 0:  # in float32, where no two tokens are as likely
        assert row["same"] == 16
        assert row["apart"] <= 1e-3


def test_a_native_folder_without_its_load_format_stops_with_the_remedy(tiny: Any, tmp_path: Path) -> None:
    import lilliput

    out = tmp_path / "out"
    recipe = lilliput.Recipe.model_validate({"steps": [{"method": "rtn"}], "export": "lilliput"})
    lilliput.compress(tiny("llama"), out, recipe=recipe, samples=2, tokens=16, eval_windows=0)
    script = "import sys; from vllm import LLM; LLM(sys.argv[1], enforce_eager=True, max_model_len=32)"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    done = subprocess.run([str(PYTHON), "-c", script, str(out)], capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert "--load-format lilliput" in done.stderr
