"""Where llama.cpp is, and what it answers when it cannot."""

import sys
from pathlib import Path

import pytest

from lilliput.errors import LilliputError
from lilliput.export.convert import llamacpp

FAKE = """
import os, sys
import numpy
__version__ = "9.9"
class Llama:
    def __init__(self, path, **told):
        if "damaged" in path:
            print("load_tensors: \\nerror loading model: a tensor is missing", file=sys.stderr)
            raise ValueError("Failed to load model from file")
        if "strange" in path:
            raise ValueError("no such architecture")
        if "aborts" in path:
            print("a.cpp:1: GGML_ASSERT(x) failed\\nbacktrace", file=sys.stderr, flush=True)
            os.abort()
        assert told["n_ctx"] >= 3
    def tokenize(self, text, add_bos, special):
        return [1] * add_bos + list(text)
    def n_vocab(self): return 4
    def reset(self): pass
    def eval(self, row): self.scores = numpy.arange(4, dtype="f4") + numpy.array(row, dtype="f4")[:, None]
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A Python with a llama_cpp that knows tokens to be bytes."""
    (tmp_path / "llama_cpp.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(llamacpp.VARIABLE, sys.executable)
    return sys.executable


def test_it_is_where_the_environment_says(engine: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert llamacpp.python() == engine
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "nothing"))
    if llamacpp.importlib.util.find_spec("llama_cpp") is None:  # type: ignore[attr-defined]
        with pytest.raises(LilliputError, match="which has no llama_cpp"):
            llamacpp.python()
    monkeypatch.setenv(llamacpp.VARIABLE, str(tmp_path / "none"))
    with pytest.raises(LilliputError, match="does not start"):
        llamacpp.python()


def test_it_answers_from_a_process_of_its_own(engine: str, tmp_path: Path) -> None:
    answer = llamacpp.ask(engine, tmp_path / "m.gguf", ["ab", "é"], [[1, 2, 3], [4, 5]])
    assert answer.problem is None
    assert answer.version == "9.9"
    assert answer.tokens == [[97, 98], [195, 169]]
    assert answer.prompts == [[1, 97, 98], [1, 195, 169]]
    assert answer.logits is not None
    assert answer.logits.shape == (2, 3, 4)
    assert answer.logits[1].tolist() == [[4, 5, 6, 7], [5, 6, 7, 8], [0, 0, 0, 0]]
    assert llamacpp.ask(engine, tmp_path / "m.gguf", ["a"], []).logits is None


def test_what_it_cannot_is_said(engine: str, tmp_path: Path) -> None:
    damaged = llamacpp.ask(engine, tmp_path / "damaged.gguf", ["a"], [[1, 2, 3]])
    assert damaged.problem == "llama.cpp does not open it: error loading model: a tensor is missing"
    strange = llamacpp.ask(engine, tmp_path / "strange.gguf", ["a"], [[1, 2, 3]])
    assert strange.problem == "llama.cpp does not open it: ValueError: no such architecture"
    aborted = llamacpp.ask(engine, tmp_path / "aborts.gguf", ["a"], [[1, 2, 3]])
    assert aborted.problem == "llama.cpp stops: a.cpp:1: GGML_ASSERT(x) failed"
