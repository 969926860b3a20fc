"""The command that serves what lies there: by layout, by what is installed, by what the user asks for."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

from lilliput.engines import serve
from lilliput.engines.serve import Address, Installed, choose
from lilliput.errors import LilliputError, PlanError, SourceError

VLLM, LLAMA = ("/bin/vllm", "serve"), ("/bin/llama-server", "--model")
ALL = Installed(VLLM, LLAMA, ("python", "-m", "server", "serve"), plugged=True)
AT = ("--host", "127.0.0.1", "--port", "8000")


@pytest.fixture
def folder(tmp_path: Path):
    def make(**config: object) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
        return tmp_path

    return make


NATIVE = {"quantization_config": {"quant_method": "lilliput", "version": 2}}
PACKED = {"quantization_config": {"quant_method": "compressed-tensors"}}


@pytest.mark.parametrize(
    ("config", "have", "engine", "command"),
    [
        (PACKED, ALL, "auto", ("/bin/vllm", "serve", "{}")),
        ({}, ALL, "auto", ("/bin/vllm", "serve", "{}")),
        (NATIVE, ALL, "auto", ("/bin/vllm", "serve", "{}", "--load-format", "lilliput")),
        (NATIVE, ALL, "transformers", ("python", "-m", "server", "serve", "{}")),
        (PACKED, Installed(vllm=VLLM), "auto", ("/bin/vllm", "serve", "{}")),
        (PACKED, Installed(transformers=("server", "serve")), "auto", ("server", "serve", "{}")),
        # vLLM of another environment knows no native layout
        (NATIVE, Installed(vllm=VLLM, transformers=("server", "serve")), "auto", ("server", "serve", "{}")),
    ],
)
def test_a_folder_goes_to_the_engine_that_reads_it(folder, config, have, engine, command) -> None:
    place = folder(**config)
    server = choose(place, have, engine=engine)
    assert server.command == (*(x.format(place) for x in command), *AT)


def test_a_gguf_file_goes_to_llama_cpp_as_does_a_folder_with_one(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.touch()
    told = {"address": Address("0.0.0.0", 81), "options": ("--n_ctx", "64")}
    wanted = ("/bin/llama-server", "--model", str(file), "--host", "0.0.0.0", "--port", "81", "--n_ctx", "64")
    assert choose(file, ALL, **told).command == wanted
    assert choose(tmp_path, ALL, **told).command == wanted


@pytest.mark.parametrize(
    ("config", "have", "engine", "error", "says"),
    [
        (PACKED, Installed(), "auto", PlanError, "pip install vllm"),
        (PACKED, Installed(), "auto", PlanError, r"transformers\[serving\]"),
        (PACKED, Installed(), "vllm", PlanError, "vLLM is not installed"),
        (PACKED, Installed(vllm=VLLM), "transformers", PlanError, r"transformers\[serving\]"),
        (NATIVE, Installed(vllm=VLLM), "vllm", PlanError, "without Lilliput"),
        (PACKED, ALL, "llama.cpp", PlanError, "--to gguf"),
        (PACKED, ALL, "vlm", PlanError, "Did you mean 'vllm'"),
        ({"quantization_config": {"bits": 4, "group_size": 64}}, ALL, "auto", SourceError, "mlx_lm.server"),
    ],
)
def test_what_cannot_be_served_says_what_to_do(folder, config, have, engine, error, says) -> None:
    with pytest.raises(error, match=says):
        choose(folder(**config), have, engine=engine)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    def says() -> str:
        with pytest.raises(LilliputError) as caught:
            choose(place, ALL)
        return str(caught.value)

    place = tmp_path / "nowhere"
    assert "no file or folder" in says()
    place = tmp_path
    assert "no config.json, and 0 .gguf files" in says()
    (tmp_path / "adapter_config.json").touch()
    assert "--enable-lora" in says()
    place = tmp_path / "model.safetensors"
    place.touch()
    assert "no .gguf file" in says()
    place = tmp_path
    (tmp_path / "config.json").write_text("{")
    assert "not valid JSON" in says()


def test_a_gguf_file_needs_llama_cpp(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.touch()
    with pytest.raises(PlanError, match="llama-cpp-python"):
        choose(file, Installed(vllm=VLLM))
    with pytest.raises(PlanError, match="which vllm does not serve"):
        choose(file, ALL, engine="vllm")


def missing(name: str) -> str:
    raise PackageNotFoundError(name)


def test_what_is_installed_is_looked_up_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    there: set[str] = set()
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda x: SimpleNamespace() if x in there else None)
    monkeypatch.setattr(serve.shutil, "which", lambda _: None)
    assert serve.installed() == Installed()
    there |= {"vllm", "llama_cpp", "transformers", "fastapi", "uvicorn", "openai", "pydantic"}
    found = serve.installed()
    assert found.plugged
    assert found.vllm[0] == found.transformers[0] == sys.executable
    assert found.llama_cpp == ()  # its server asks for more
    versions = {}
    monkeypatch.setattr(serve.importlib.metadata, "version", lambda x: versions[x] if x in versions else missing(x))
    assert serve.installed().vllm[1:] == ("-m", "vllm.entrypoints.openai.api_server", "--model")
    versions["vllm"] = "0.33"
    assert serve.installed().vllm[1:] == ("-m", "vllm.entrypoints.cli.main", "serve")
    monkeypatch.setattr(serve.shutil, "which", lambda x: f"/bin/{x}")
    there.remove("vllm")
    found = serve.installed()
    assert (found.vllm, found.llama_cpp, found.plugged) == (VLLM, LLAMA, False)
