"""The engine's eye: what transformers makes of a folder, beside what Lilliput's own reader decodes.

A folder may look fine to the code that wrote it while an engine draws random numbers for a tensor that it looks for
under another name, or decodes codes otherwise. So the engine's own model is built from the written
config. First empty, on the meta device, which costs no memory for weights: it shows what the engine misses, finds in
another shape, or cannot build. Then its blocks are filled one by one through its own loader and run on the same hidden
states as ours. Where the whole model fits in memory, its logits are compared as well, as a user would get them.
"""

from __future__ import annotations

import copy
import io
import math
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lilliput import units
from lilliput.anatomy.model import Block
from lilliput.anatomy.wrapper import module_name, skeleton, text_prefix
from lilliput.machine import memory as ram
from lilliput.model.stored import Model
from lilliput.progress import Progress
from lilliput.runtime import behaviours, int8
from lilliput.runtime.linear import CompressedLinear
from lilliput.source.shards import Shards
from lilliput.streaming.forward import embed
from lilliput.streaming.states import Activations
from lilliput.streaming.walk import resident

TOKENS = 32
# What a block adds to its inputs, in the engine and as our reader decodes it, in float32: sums in another order differ
# by 1e-6, decoding in half precision by the rounding of that precision. A wrong tensor differs by about 1. Logits add
# up what all blocks differ by.
EXACT = 1e-4
CLOSE = {"block": 2e-2, "logits": 1e-1}
# Where two experts are almost equally good, rounding decides between them: a quarter of the tokens may go elsewhere.
ROUTED = 0.75
WORD = 32  # bits of a word of codes
_LIBRARY = "compressed_tensors"
SHAPE = ".weight_shape"  # read as a value while an engine decodes, so it is never left empty


@dataclass(frozen=True)
class Look:
    """What came of opening a folder in its engine.

    problems: what is wrong, in words; notes: what could not be checked or differs by rounding; blocks: how many were
    compared; error: the largest relative difference of what a block adds to a token's hidden state; logits: that of the
    whole model's logits, where it fits in memory.
    """

    engine: str
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    blocks: int = 0
    error: float | None = None
    logits: float | None = None

    @property
    def detail(self) -> str:
        """What was done, in words."""
        words = [self.engine]
        if self.error is not None:
            words.append(f"{self.blocks} blocks compute what the files say, to {self.error:.0e}")
        if self.logits is not None:
            words.append(f"logits to {self.logits:.0e}")
        return ", ".join(words)


def look(folder: Path, *, memory: int | None = None, progress: Progress | None = None) -> Look:
    """Open `folder` as its engine does and compare with our own reader, within `memory` bytes above a fresh import.

    Problems are reported, not raised: whatever the engine raises is a finding.
    """
    import transformers

    from lilliput.model.stored import open_model

    engine = f"transformers {transformers.__version__}"
    with trial():
        ours = open_model(str(folder), dtype=torch.float32)
        config = transformers.AutoConfig.from_pretrained(folder)
        reader = Shards(folder)
        model, problems, notes = _empty(config, _state(reader), ours.carried)
        if model is None or problems:
            return Look(engine, problems, notes)
        _plain_caches(model)
        with torch.no_grad(), int8.in_floats():
            return _compare(Look(engine, (), notes), model, config, reader, ours, memory, progress)


def least(blocks: Sequence[Block]) -> int:
    """Bytes that comparing takes at least: the largest block twice in float32, and once more while it is decoded."""
    return max((12 * sum(x.parameters for x in block.linears) for block in blocks), default=0)


@contextmanager
def trial() -> Iterator[None]:
    """The engine's loader on trial: it reports nothing, because the caller tells what it found, and does all by itself
    where several processes share a run, because only one of them looks."""
    from compressed_tensors.offload.utils import as_single_threaded
    from loguru import logger  # compressed-tensors reports through it, to the stderr of its first import
    from transformers.utils import logging

    level = logging.get_verbosity()
    loud = all(on for name, on in logger._core.activation_list if name == f"{_LIBRARY}.")  # type: ignore[attr-defined]
    logging.set_verbosity(logging.CRITICAL)
    logger.disable(_LIBRARY)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), as_single_threaded():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if loud:
            logger.enable(_LIBRARY)


def _state(reader: Shards) -> dict[str, Tensor]:
    """All tensors of a folder by stored name, on the meta device but for the shapes of packed ones."""
    return {
        name: reader.read(name) if name.endswith(SHAPE) else torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        for name, entry in reader.entries.items()
    }


def hollow(kind: Any, config: Any, state: Mapping[str, Tensor]) -> tuple[nn.Module, Mapping[str, Any]]:
    """The engine's model in float32 on the meta device, loaded by its own loader, and what the loader said.

    kind: its class; state: stored name to tensor, on the meta device but for what the loader reads as a value
    (`SHAPE`). Raises whatever the engine raises. Without values a loader that decodes knows the width of a row only up
    to its last word of codes: what is wider by less than a word is no finding. compressed-tensors before 0.19 decodes
    only what is loaded already, and not without values: there the model stays packed.
    """
    with trial():
        try:
            model, info = _loaded(kind, config, state)
        except RuntimeError as error:
            packed = _undecoded(config)
            if packed is None or "meta tensors" not in str(error):
                raise
            model, info = _loaded(kind, packed, state)
    odd = [name for name, actual, expected in info["mismatched_keys"] if not _in_last_word(actual, expected)]
    return model.eval(), {**info, "mismatched_keys": odd}


def _loaded(kind: Any, config: Any, state: Mapping[str, Tensor]) -> tuple[nn.Module, Mapping[str, Any]]:
    return kind.from_pretrained(  # type: ignore[no-any-return]
        None,
        config=copy.deepcopy(config),
        state_dict=dict(state),
        device_map={"": "meta"},
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )


def _undecoded(config: Any) -> Any:
    """The config without its request to decode; None where it has none."""
    how = getattr(config, "quantization_config", None)
    if not isinstance(how, dict) or not how.get("dequantize"):
        return None
    packed = copy.deepcopy(config)
    packed.quantization_config = {key: value for key, value in how.items() if key != "dequantize"}
    return packed


def _in_last_word(actual: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether a shape is wider than the wanted one by codes of 2 or more bits that one word holds."""
    return tuple(actual[:-1]) == tuple(expected[:-1]) and 0 <= actual[-1] - expected[-1] < WORD // 2


def _fill(
    model: nn.Module,
    quantizer: Any,
    block: nn.Module,
    reader: Shards,
    stored: Iterable[str],
    like: nn.Module,
    dtype: torch.dtype,
) -> None:
    """Load some stored tensors, which are a block's, through the engine's loader, ready to run.

    quantizer: the engine's, None for a dense folder. Buffers that no file holds are taken from `like`, the same block
    of our model; `dtype` is that of weights in the folder.
    """
    from compressed_tensors.compressors import decompress_module
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    state = {name: reader.read(name) for name in stored}
    how = LoadStateDictConfig(
        device_map={"": "cpu"},
        dtype=torch.float32,
        hf_quantizer=quantizer,
        weight_mapping=get_model_conversion_mapping(model, None, quantizer),
    )
    with trial():
        convert_and_load_state_dict_in_model(model, state, how)
    for module in list(block.modules()):
        if isinstance(module, CompressedLinear):
            module.fill({name: reader.read(name) for name in module.spec.describe()}, torch.device("cpu"))
        else:
            decompress_module(module)  # what the first forward pass of the whole model does; leaves dense ones alone
            _settle(module, dtype)
    ours = dict(like.named_modules())
    for name, module in block.named_modules():
        for key in module._non_persistent_buffers_set:
            if name in ours and key in ours[name]._buffers:
                module._buffers[key] = ours[name]._buffers[key]


def _empty(
    config: Any, state: Mapping[str, Tensor], carried: Sequence[str]
) -> tuple[nn.Module | None, tuple[str, ...], tuple[str, ...]]:
    """The engine's empty model, its problems and notes."""
    try:
        model, info = hollow(type(skeleton(config)), config, state)
    except Exception as error:  # whatever the engine raises is the finding
        return None, (f"transformers does not open it: {first_line(error)}",), ()
    problems = [
        f"transformers finds no tensor for {name} and would initialize it at random"
        for name in sorted(info["missing_keys"])
    ]
    problems += [f"transformers finds another shape for {name}" for name in sorted(map(str, info["mismatched_keys"]))]
    problems += [str(x) for x in info.get("error_msgs") or ()]
    strange = sorted(set(info["unexpected_keys"]) - set(carried))
    notes = [f"transformers has no place for {len(strange)} tensors, including {strange[0]}"] if strange else []
    return model, tuple(problems), tuple(notes)


def _compare(
    result: Look,
    model: nn.Module,
    config: Any,
    reader: Shards,
    ours: Model,
    memory: int | None,
    progress: Progress | None,
) -> Look:
    """The engine's blocks, and its logits where there is room for all of them, beside those of our reader."""
    sizes, room = ours.skeleton.shapes, ram.room(memory)
    ids = torch.arange(1, 1 + min(TOKENS, ours.positions or TOKENS)).unsqueeze(0) % sizes[ours.skeleton.head][0]
    whole = 8 * sum(prod(x) for x in sizes.values()) + sum(x.nbytes for x in reader.entries.values())
    if ram.BASE + least(ours.anatomy().blocks) > room:
        needed = units.readable(ram.BASE + least(ours.anatomy().blocks), up=True)
        note = f"only names and shapes were compared with those of {result.engine}: comparing blocks takes {needed}"
        return replace(result, notes=(*result.notes, note))
    errors: list[float] = []
    try:
        with behaviours.paused(ours.skeleton.model):  # the engine's blocks are filled one by one, without any
            for error in _blocks(model, config, reader, ours, ids):
                errors.append(error)
                if progress is not None:
                    progress.step(len(errors), len(ours.skeleton.block_names), "in its engine")
        result = replace(result, blocks=len(errors), error=max(errors))
    except Exception as error:  # whatever the engine raises; alone it may be the way in which a block was called
        result = replace(result, notes=(*result.notes, f"blocks could not be compared: {first_line(error)}"))
    if ram.BASE + whole <= room:
        try:
            result = replace(result, logits=_logits(type(model), reader.files[0].parent, ours, ids))
        except Exception as error:
            return replace(result, problems=(f"transformers opens it but cannot run it: {first_line(error)}",))
    return _judged(result, errors)


def _judged(result: Look, errors: Sequence[float]) -> Look:
    """Problems and notes for the differences that were found."""
    problems, notes = list(result.problems), list(result.notes)
    for what, error in (("block", result.error), ("logits", result.logits)):
        if error is None:
            continue
        place = "the logits" if what == "logits" else f"block {errors.index(error)}"
        if not math.isfinite(error):
            problems.append(f"the output of {place} is not finite: a weight is damaged or overflows")
        elif error > CLOSE[what]:
            problems.append(
                f"transformers computes something else for {place} than the files say: it differs by {error:.2g}"
            )
    if not problems and (result.error or 0) > EXACT:
        notes.append(
            f"{result.engine} decodes in half precision: blocks differ by {result.error:.0e} from exact decoding"
        )
    return replace(result, problems=tuple(problems), notes=tuple(notes))


def _dtype(ours: Model) -> torch.dtype:
    """Of weights in the folder, decoded."""
    return ours.dtype(f"{ours.skeleton.block_names[0]}.{ours.anatomy().blocks[0].linears[0].name}.weight")


def _settle(module: nn.Module, dtype: torch.dtype) -> None:
    """Give a linear that has just been decoded its weight as a model in the folder's own `dtype` has it, in float32.

    So small floats in blocks, which are decoded in bfloat16 whatever the model's dtype, meet inputs in float32; and
    linears that round their inputs see the same ones as ours do: a weight that differs by its last bit moves inputs
    of later linears across the edge between two codes.
    """
    scheme, weight = getattr(module, "quantization_scheme", None), module._parameters.get("weight")
    if scheme is None or weight is None:
        return
    if scheme.input_activations is not None or weight.dtype == torch.bfloat16:
        weight.data = weight.data.to(dtype).float()


def _plain_caches(model: nn.Module) -> None:
    """Let attentions keep keys and values as they are: compressed-tensors rounds them also where nothing is cached,
    and what is compared here are the weights."""
    for module in model.modules():
        if hasattr(module, "kv_cache") and getattr(module, "quantization_scheme", None) is not None:
            module.quantization_scheme = None  # type: ignore[assignment]


def _logits(kind: Any, folder: Path, ours: Model, ids: Tensor) -> float:
    """The whole model as a user opens it, but for `_settle`."""
    with trial():
        theirs = kind.from_pretrained(folder, dtype=torch.float32).eval()
        if hasattr(theirs, "ct_decompress_hook"):  # what the first forward pass does, before it meets another dtype
            theirs.hf_quantizer.compressor.decompress_model(theirs)
            for module in theirs.modules():
                _settle(module, _dtype(ours))
        _plain_caches(theirs)
        actual = theirs(input_ids=ids, use_cache=False).logits.float()
    del theirs
    names = list(ours.skeleton.shapes)
    ours.load(names)
    try:
        model: Any = ours.skeleton.model
        with behaviours.prompted(model, ids.shape[1]):
            expected = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        ours.unload(names)
    routed = behaviours.of(model) is not None or any(
        x.expert is not None for block in ours.anatomy().blocks for x in block.linears
    )
    return _difference(actual, expected, expected.mean(-1, keepdim=True), routed)


def _blocks(model: nn.Module, config: Any, reader: Shards, ours: Model, ids: Tensor) -> Iterator[float]:
    """Block by block, one of the engine's beside one of ours, on the same inputs."""
    from transformers.quantizers.auto import AutoHfQuantizer

    how = getattr(config, "quantization_config", None)  # the loader takes it out of a model that it decodes at once
    quantizer = None if how is None else AutoHfQuantizer.from_config(how, pre_quantized=True)
    if quantizer is not None:
        quantizer.validate_environment()
    with tempfile.TemporaryDirectory(prefix="lilliput-engine-") as place:
        store = Activations(Path(place) / "hidden", (*ids.shape, ours.skeleton.hidden_size), torch.float32, create=True)
        calls = embed(ours, ids, 1, store).calls[1]
        hidden = store.read(0, 1)
        store.delete()
    modules = dict(model.named_modules())
    prefix = text_prefix(model, model.config)
    for i in resident(ours):
        block = modules[module_name(ours.skeleton.block_names[i], modules, prefix)]
        stored = {x for name in ours.skeleton.names_of(i) for x in ours.parts(name)}
        stored |= {x for x in (f"{n.rpartition('.')[0]}{SHAPE}" for n in stored) if x in reader.entries}
        _fill(model, quantizer, block, reader, sorted(stored), ours.skeleton.block(i), _dtype(ours))
        expected = ours.skeleton.run(i, hidden, calls)
        routed = any(x.expert is not None for x in ours.anatomy().blocks[i].linears)
        yield _difference(ours.skeleton.run(i, hidden, calls, module=block), expected, hidden, routed)
        block.to("meta")
        hidden = expected


def _difference(actual: Tensor, expected: Tensor, base: Tensor, routed: bool) -> float:
    """|actual - expected| over |expected - base|, the largest of all tokens; infinite where one is not finite.

    routed: experts are chosen on the way, so that the `ROUTED` quantile counts instead.
    """
    if not bool(torch.isfinite(actual).all() & torch.isfinite(expected).all()):
        return math.inf
    off = (actual - expected).double().norm(dim=-1)
    size = (expected - base).double().norm(dim=-1) + 1e-6 * expected.double().norm(dim=-1)
    ratio = (off / size.clamp_min(1e-30)).flatten()
    return float(ratio.quantile(ROUTED) if routed else ratio.max())


def first_line(error: Exception) -> str:
    """What an engine's error says first, with its class."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
