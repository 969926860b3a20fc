"""Adapters of the peft library: put into a model, trained, and written so that peft loads them.

peft's own classes run; what is written is its layout, adapter_model.safetensors and adapter_config.json.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save_file
from torch import Tensor, nn

from lilliput.errors import PlanError
from lilliput.runtime.bottleneck import CONFIG, WEIGHTS
from lilliput.verbs.adapt import Adaptable, Adapter

ADAPTER = "default"  # what peft calls the one adapter


def peft() -> Any:
    """The library. Raises PlanError where it is not installed."""
    try:
        import peft as library
    except ImportError:
        raise PlanError(
            "adapters of this kind are made with peft, which is missing: pip install 'lilliput[peft]'"
        ) from None
    return library


def wrapped(model: nn.Module, config: Any) -> Any:
    """The model as peft's own, with a new adapter in it; everything else stays in place, and gets no gradients."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft says of settings that it completes by itself
        return peft().PeftModelForCausalLM(model, config, adapter_name=ADAPTER)


def fan_in(model: nn.Module, linears: Sequence[Adaptable]) -> bool:
    """Whether the linears hold their weights as [in, out]."""
    from transformers.pytorch_utils import Conv1D  # not where methods are only listed

    return all(isinstance(model.get_submodule(x.name), Conv1D) for x in linears)


def names(linears: Sequence[Adaptable]) -> list[str]:
    """The linears as peft is told of them, in full."""
    return [x.name for x in linears]


class Borrowed(Adapter):
    """An adapter of peft. inner: the model as `wrapped` made it; said: metadata of the file that is written, one
    entry alone: safetensors writes several in an order that changes from run to run."""

    said: ClassVar[Mapping[str, str]] = {"format": "pt"}

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def layers(self, kind: type) -> dict[str, Any]:
        """The adapter's layers of a class of peft, by the name of the linear."""
        prefix = "inner.base_model.model."
        return {n.removeprefix(prefix): x for n, x in self.named_modules() if isinstance(x, kind)}

    def tensors(self) -> dict[str, Tensor]:
        """What is written, by peft's names."""
        library = peft()
        found = library.get_peft_model_state_dict(self.inner, adapter_name=ADAPTER, save_embedding_layers=False)
        return {name: x.detach().cpu().contiguous().clone() for name, x in sorted(found.items())}

    def config(self) -> Any:
        """What is written beside it."""
        config = copy.deepcopy(self.inner.peft_config[ADAPTER])
        config.inference_mode = True
        return config

    def save(self, folder: Path) -> None:
        write(folder, self.tensors(), self.config(), self.said)


def write(folder: Path, tensors: dict[str, Tensor], config: Any, said: Mapping[str, str]) -> None:
    """A folder that peft reads; equal adapters give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, dict(said))
    config.save_pretrained(str(folder))
    path = folder / CONFIG
    plain = json.loads(path.read_text(encoding="utf-8"))
    plain = {key: sorted(x) if isinstance(x, list) else x for key, x in plain.items()}  # sets of names
    path.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
