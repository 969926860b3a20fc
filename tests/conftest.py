"""For all tests: one thread, no network, nothing fetched; small models that several rooms share."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as tf
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lilliput import efficiency
from lilliput.data import docs
from lilliput.streaming.states import Activations

torch.set_num_threads(1)

_VOCABULARY = 512
_SIZES = {"vocab_size": _VOCABULARY, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 256}
_TINY: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(
        **_SIZES, num_hidden_layers=4, intermediate_size=128, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "qwen2": lambda: tf.Qwen2Config(**_SIZES, num_hidden_layers=2, intermediate_size=128, num_key_value_heads=2),
    "mixtral": lambda: tf.MixtralConfig(
        **_SIZES,
        num_hidden_layers=2,
        intermediate_size=64,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    # A block without experts between two that have them.
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **_SIZES,
        num_hidden_layers=3,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "gpt2": lambda: tf.GPT2Config(vocab_size=_VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=256),
    # Attention and MLP side by side.
    "neox": lambda: tf.GPTNeoXConfig(**_SIZES, num_hidden_layers=2, intermediate_size=128, use_parallel_residual=True),
    # Large enough that the weights outweigh the files beside them.
    "wide": lambda: tf.LlamaConfig(
        **{**_SIZES, "hidden_size": 256},
        num_hidden_layers=8,
        intermediate_size=1024,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the longest tests come first, so that no process is left with one of them at the end."""
    ranks = {"real": 0, "slow": 1}
    place: dict[Path, int] = {}
    for item in items:
        mine = min((n for mark, n in ranks.items() if item.get_closest_marker(mark)), default=2)
        place[item.path] = min(mine, place.get(item.path, 2))
    items.sort(key=lambda x: place[x.path])
    if Version(version("compressed-tensors")) >= Version("0.19"):
        return
    for item in items:
        if item.get_closest_marker("later"):
            item.add_marker(pytest.mark.skip(reason="compressed-tensors before 0.19 does otherwise"))


@pytest.fixture(scope="session", autouse=True)
def _quickly_measured() -> Iterator[None]:
    """Pages show what this machine is measured to do, for which small products will do here."""
    with pytest.MonkeyPatch.context() as patch:
        quick = functools.partial(efficiency.measure_device, side=128, buffer=1 << 22, repeats=1)
        patch.setattr(efficiency, "measure_device", quick)
        yield


@pytest.fixture(scope="session")
def script() -> Callable[..., ModuleType]:
    """A function that imports NAME.py of scripts/, or of another folder of the repository: quicker than a process."""

    def load(name: str, folder: str = "scripts") -> ModuleType:
        path = Path(__file__).resolve().parents[1] / folder / f"{name}.py"
        module_name = f"{folder}_{name}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # where dataclasses and pickles look for it
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def tokenizer() -> tf.PreTrainedTokenizerFast:
    """A BPE tokenizer of 512 tokens that knows every byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(docs.pieces("docs:reference"), 20), trainer)
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: tf.PreTrainedTokenizerFast) -> Callable[[str], Path]:
    """The folder of a small random model, by name (see _TINY), with a BPE tokenizer of 512 tokens. Read it only."""
    root = tmp_path_factory.mktemp("tiny")

    def make(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            torch.manual_seed(0)
            model = tf.AutoModelForCausalLM.from_config(_TINY[name]()).float()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() >= 2:
                        parameter.mul_(4.0)  # predictions far from uniform
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of a model of three narrow blocks with noise on all weights, by seed; no tokenizer. Read it only."""

    def make(seed: int) -> Path:
        torch.manual_seed(seed)
        config = tf.LlamaConfig(
            vocab_size=48, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
        )  # fmt: skip
        whole = tf.AutoModelForCausalLM.from_config(config).float()
        with torch.no_grad():
            for value in whole.parameters():
                value.add_(torch.randn(value.shape) * 0.2)
        folder = tmp_path_factory.mktemp("noisy")
        whole.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def together() -> Iterator[Callable[..., dict[str, Any]]]:
    """Runs a job in several processes that know each other; see ranks_driver.py for jobs and answers."""
    script = Path(__file__).parent / "resume" / "ranks_driver.py"
    process = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    said, heard = process.stdin, process.stdout

    def run(**job: Any) -> dict[str, Any]:
        said.write(json.dumps({"ranks": 2, **job}, default=str) + "\n")
        said.flush()
        answer: dict[str, Any] = json.loads(heard.readline())
        return answer

    yield run
    said.close()
    heard.close()
    process.wait(30)


@pytest.fixture
def spilled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each file of hidden states that the test makes, in order."""
    sizes: list[int] = []
    real = Activations.__init__

    def counted(
        self: Activations, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, *, create: bool
    ) -> None:
        real(self, path, shape, dtype, create=create)
        sizes.append(path.stat().st_size)

    monkeypatch.setattr(Activations, "__init__", counted)
    return sizes
