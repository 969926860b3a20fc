"""GGUF files: tensors dequantized one at a time by the `gguf` package, under the names that transformers gives them.

What llama.cpp's converter did to values and layouts (permuted query and key rows, norms stored as 1 + w, transposed
GPT-2 weights) is undone by transformers' own processors, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import _type_traits
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from lilliput.errors import SourceError
from lilliput.source.gguf_header import Stretch, read_header
from lilliput.source.gguf_metadata import lean
from lilliput.source.reader import Entry, pread, row_chunks

PIECE = 1 << 16  # values dequantized at a time: temporaries of several float32 a value stay in the caches
PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


class Gguf:
    """Reader of one GGUF file; quantized tensors come out in float32, plain ones in the dtype of the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_header(path)
        for name, stretch in header.tensors.items():
            if stretch.kind not in PLAIN and stretch.kind not in _type_traits:
                raise SourceError(
                    f"{path}: tensor {name} has type {stretch.kind.name}, which the gguf package cannot dequantize. "
                    "Take a file of another type, or the original model."
                )
        self.config, processor_config = _config(path)
        experts = next((x for n, x in header.tensors.items() if "ffn_gate_exps." in n), None)
        if experts is not None and hasattr(self.config, "moe_intermediate_size"):
            self.config.moe_intermediate_size = experts.shape[1]  # transformers leaves it at the class's default
        self._processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=processor_config)
        names, shapes = _names(self.config, self._processor, path)
        self._stretches = header.tensors
        self._from: dict[str, tuple[str, int | None]] = {}
        self.entries: dict[str, Entry] = {}
        for name in header.tensors:
            if "_exps." in name and name not in names and (fused := names.get(name.removesuffix(".weight"))):
                names[name] = fused  # a 3-D parameter has no ".weight" of its own
        self.unnamed: tuple[str, ...] = tuple(x for x in header.tensors if x not in names)
        for name, stretch in header.tensors.items():
            if name not in names:
                continue
            dtype = PLAIN.get(stretch.kind, torch.float32)
            if len(stretch.shape) == 3 and "_exps." in name:
                part = name.split("ffn_")[1].split("_exps")[0]
                base = names[name].rpartition(".experts.")[0]
                for e in range(stretch.shape[0]):
                    self._add(f"{base}.experts.{e}.{part}_proj.weight", name, e, stretch.shape[1:], dtype)
            else:
                self._add(names[name], name, None, shapes.get(names[name], stretch.shape), dtype)

    def _add(self, name: str, stored: str, index: int | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        whole = self._stretches[stored]
        nbytes = whole.nbytes if index is None else whole.nbytes // whole.shape[0]
        self._from[name] = (stored, index)
        self.entries[name] = Entry(shape, dtype, nbytes, self.path)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor (or its rows [start, stop)) as transformers' model holds it."""
        stored, index = self._from[name]
        stretch = self._stretches[stored]
        if rows is not None and stored.startswith(("token_embd.", "output.")) and len(stretch.shape) == 2:
            return self._values(stretch, *rows)[1]  # row by row in both layouts: no need to read the rest
        whole = self._values(stretch, *((0, stretch.shape[0]) if index is None else (index, index + 1)))[1]
        out = self._undo(stored, whole if index is None else whole[0])
        return (out if rows is None else out[rows[0] : rows[1]]).contiguous()

    def chunks(self, name: str) -> Iterator[tuple[NDArray[np.uint8], Tensor]]:
        stored, index = self._from[name]
        stretch = self._stretches[stored]
        if index is not None:
            yield self._values(stretch, index, index + 1)
            return
        for rows in row_chunks(stretch.shape, 4 * int(np.prod(stretch.shape[1:]))):
            yield self._values(stretch, *rows)

    def _values(self, stretch: Stretch, start: int, stop: int) -> tuple[NDArray[np.uint8], Tensor]:
        """Stored bytes and values of rows [start, stop) along the first axis, as they lie in the file."""
        row = stretch.nbytes // stretch.shape[0]
        shape = (stop - start, *stretch.shape[1:])
        buffer = np.empty((stop - start) * row, dtype=np.uint8)
        pread(self.path, stretch.offset + start * row, buffer)
        if stretch.kind in PLAIN:
            return buffer, torch.from_numpy(buffer).view(PLAIN[stretch.kind]).reshape(shape)
        return buffer, torch.from_numpy(_dequantized(buffer, stretch.kind)).reshape(shape)

    def _undo(self, stored: str, values: Tensor) -> Tensor:
        """What the converter did to this tensor, undone."""
        half = values.dtype == torch.bfloat16  # numpy has none; float32 holds it exactly
        array = values.float().numpy() if half else values.numpy()
        parsed: dict[str, Any] = {"tensors": {}}
        processed = self._processor.process(
            weights=array, name=stored, tensor_key_mapping=None, parsed_parameters=parsed
        )
        out = torch.from_numpy(np.ascontiguousarray(processed.weights))
        return out.to(values.dtype)


def _dequantized(buffer: NDArray[np.uint8], kind: GGMLQuantizationType) -> NDArray[np.float32]:
    """The values of whole blocks of bytes, flat. As `gguf.quants.dequantize` makes them, which goes through 16 rows at
    a time, and so spends most of its time between numpy's operations."""
    traits = _type_traits[kind]
    traits.init_grid()  # type: ignore[no-untyped-call]
    block, size = GGML_QUANT_SIZES[kind]
    blocks = buffer.reshape(-1, size)
    values = np.empty((len(blocks), block), dtype=np.float32)
    step = max(1, PIECE // block)
    with np.errstate(all="ignore"):  # a scale that is no number shows up in the scan, with its tensor's name
        for start in range(0, len(blocks), step):
            values[start : start + step] = traits.dequantize_blocks(blocks[start : start + step])
    return values


def _config(path: Path) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The transformers config, and the plain values that the processors read."""
    try:
        with lean():
            values = load_gguf_checkpoint(str(path))["config"]
        config = AutoConfig.for_model(**values)
    except (ValueError, KeyError, NotImplementedError, IndexError) as error:
        raise SourceError(
            f"transformers cannot make a config out of {path}: {error}. Take the model as a safetensors folder instead."
        ) from error
    return config, values


class _Flat:
    """As much of a model as naming needs: itself and its base model. Every submodule would build the same table."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = model.config
        self._state: dict[str, Tensor] = model.state_dict()
        self._children = [(n, _Flat(x)) for n, x in model.named_children() if isinstance(x, PreTrainedModel)]

    def state_dict(self) -> dict[str, Tensor]:
        return self._state

    def named_children(self) -> list[tuple[str, _Flat]]:
        return self._children


def _names(
    config: PretrainedConfig, processor: TensorProcessor, path: Path
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """GGUF name -> name in transformers, and the shapes that the model class has."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        names: dict[str, str] = get_gguf_hf_weights_map(_Flat(model), processor)
    except (ValueError, NotImplementedError) as error:
        raise SourceError(
            f"the tensors of {path} have no names in transformers: {error}. Take the model as a safetensors "
            "folder instead."
        ) from error
    return names, {name: tuple(x.shape) for name, x in model.state_dict().items()}
